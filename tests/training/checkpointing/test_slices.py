"""Checkpoints whose tensors lie in slices, written by several and read by any number."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from holdfast.training.averages.averaging import Term, write_average
from holdfast.training.averages.ensemble import write_ensemble
from holdfast.training.checkpointing.diff import compare
from holdfast.training.checkpointing.inspection import verify_all
from holdfast.training.checkpointing.loading import load_checkpoint, load_weights
from holdfast.training.checkpointing.manager import RESUME_FILES, CheckpointContents
from holdfast.training.checkpointing.manifest import (
    MANIFEST_NAME,
    Manifest,
    joint_digest,
    local_folder,
    manifest_of,
    part_name,
    read_manifest,
    verify,
)
from holdfast.training.checkpointing.policy import KeepLast, KeepTopK
from holdfast.training.checkpointing.slices import digest_of_part, open_part
from holdfast.training.errors import CheckpointCorruptError
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.weights.reading import file_digest, read_weights, weights_file
from tests.training.checkpointing.checkpoints import KEEP_ALL, contents_at, managing
from tests.training.checkpointing.slices_in_rows import (
    Cut,
    managing_slices,
    odd_tensors,
    save_slices,
)


def odd_contents(step: int) -> CheckpointContents:
    return replace(contents_at(step), tensors=odd_tensors(step))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "digits" / "a")


def assert_same(found: dict[str, dict[str, Tensor]], step: int, cut: Cut | None = None) -> None:
    expected = odd_tensors(step)
    assert found.keys() == expected.keys()
    for stem, inner in expected.items():
        assert found[stem].keys() == inner.keys()
        for name, tensor in inner.items():
            own = tensor
            if cut is not None and stem != "state":
                region = cut.region(stem, name, tuple(tensor.shape))
                own = region.of(tensor, Cut(0, 1).region(stem, name, tuple(tensor.shape)))
            assert found[stem][name].dtype == own.dtype
            assert torch.equal(found[stem][name], own), f"{stem}.{name}"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_what_any_number_has_written_any_number_reads(run: RunDirectory, size: int) -> None:
    save_slices(run, size, odd_contents(5))
    folder = run.checkpoint(5)
    assert verify(folder).format_version == 2
    [seen] = verify_all([folder])
    assert seen.condition == "good"
    manifest = manifest_of(local_folder(folder))
    assert_same(load_checkpoint(local_folder(folder), manifest).tensors, 5)
    for readers in (1, 2, 3, 5):
        for rank in range(readers):
            cut = Cut(rank, readers)
            restored = load_checkpoint(local_folder(folder), manifest, slicing=cut)
            assert_same(restored.tensors, 5, cut)
    assert restored.tensors["model"]["again"] is restored.tensors["model"]["tied"]
    weights = load_weights(folder)
    assert_same({**odd_tensors(5), "model": weights}, 5)
    assert read_weights(folder).keys() == weights.keys()
    assert file_digest(weights_file(folder)).startswith("sha256:")


def test_where_all_is_verified_each_reads_the_files_of_its_own_slices_alone(
    run: RunDirectory,
) -> None:
    save_slices(run, 4, odd_contents(5))
    folder = run.checkpoint(5)
    manifest = manifest_of(local_folder(folder))
    damaged = folder / "optimizer-00003-of-00004.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for rank in range(4):
        cut, found = Cut(rank, 4), local_folder(folder)
        if rank != 2:
            restored = load_checkpoint(found, manifest, slicing=cut, only_own=True)
            assert_same(restored.tensors, 5, cut)
        for only_own in (False, True) if rank == 2 else (False,):
            with pytest.raises(CheckpointCorruptError, match=r"00003-of-00004.safetensors was"):
                load_checkpoint(found, manifest, slicing=cut, only_own=only_own)


def test_slices_and_whole_files_are_compared_and_averaged_alike(
    run: RunDirectory, tmp_path: Path
) -> None:
    other = RunDirectory(tmp_path / "digits" / "b")
    save_slices(run, 3, odd_contents(5), odd_contents(6))
    with managing(other) as manager:
        for step in (5, 6):
            manager.save(odd_contents(step), wait=True)
    assert not (read_manifest(other.checkpoint(5)).shapes)
    assert compare(run.checkpoint(5), other.checkpoint(5)).differences == []
    found = compare(run.checkpoint(5), other.checkpoint(6)).differences
    assert {"a.weight", "a.weight/exp_avg"} <= {difference.name for difference in found}
    digests = []
    for side in (run, other):
        terms = [Term(side.checkpoint(step) / "model.safetensors", step) for step in (5, 6)]
        track = [Term(side.checkpoint(6) / "ema.safetensors", 1.0, "decay-0.9/")]
        members = [term.path for term in terms]
        digests.append(
            [
                write_average(side.path / "mean.safetensors", terms),
                write_average(side.path / "one.safetensors", terms[:1]),
                write_ensemble(side.path / "both.safetensors", members),
                open_part(track[0].path).layout.slots.keys(),
            ]
        )
    assert digests[0] == digests[1]
    path = other.checkpoint(5) / "model.safetensors"
    assert (run.path / "one.safetensors").read_bytes() == path.read_bytes()


def missing(folder: Path, other: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncated(folder: Path, other: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def of_another_commit(folder: Path, other: Path) -> None:
    shutil.copy(other / "model-00002-of-00003.safetensors", folder)


def signed(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def left_out(folder: Path, other: Path) -> None:
    """A manifest that never knew of a file, as a writer with a fault would leave it."""
    manifest = read_manifest(folder)
    files = {n: e for n, e in manifest.files.items() if n != "model-00003-of-00003.safetensors"}
    signed(folder, manifest.model_copy(update={"files": files}))


def doubled(folder: Path, other: Path) -> None:
    manifest = read_manifest(folder)
    name = "model-00004-of-00003.safetensors"
    shutil.copy(folder / "model-00002-of-00003.safetensors", folder / name)
    files = {**manifest.files, name: manifest.files["model-00002-of-00003.safetensors"]}
    signed(folder, manifest.model_copy(update={"files": files}))


def of_another_shape(folder: Path, other: Path) -> None:
    manifest = read_manifest(folder)
    shapes = {**manifest.shapes, "model": {**manifest.shapes["model"], "a.weight": (6, 5)}}
    signed(folder, manifest.model_copy(update={"shapes": shapes}))


def of_a_huge_shape(folder: Path, other: Path) -> None:
    manifest = read_manifest(folder)
    shapes = {**manifest.shapes, "model": {**manifest.shapes["model"], "a.weight": (10**15, 5)}}
    signed(folder, manifest.model_copy(update={"shapes": shapes}))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (missing, "model-00002-of-00003.safetensors is missing"),
        (truncated, "model-00002-of-00003.safetensors has "),
        (of_another_commit, "model-00002-of-00003.safetensors was changed: the manifest says"),
        (left_out, "of model.a.bias 6 of 7 elements are in 2 files: slices are missing"),
        (doubled, "the same elements are in "),
        (of_another_shape, "holds [1, 5] of model.a.weight from [6, 0] on, and the manifest says"),
        (of_a_huge_shape, "a.weight"),
    ],
)
def test_slices_that_do_not_belong_together_are_set_aside_in_one_line(
    run: RunDirectory, harm, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_slices(run, 3, odd_contents(5), odd_contents(6))
    harm(run.checkpoint(6), run.checkpoint(5))
    [seen] = verify_all([run.checkpoint(6)])
    assert seen.condition == "damaged"
    assert told in str(seen.error)
    with caplog.at_level(logging.WARNING), managing_slices(run, 2) as (manager, _):
        restored = manager.restore()
    assert restored is not None
    assert restored.manifest.step == 5
    [warning] = [record.getMessage() for record in caplog.records]
    assert told in warning
    assert "\n" not in warning


@pytest.mark.parametrize("harm", [left_out, doubled, of_another_shape])
def test_an_average_of_slices_that_do_not_fit_is_refused(run: RunDirectory, harm) -> None:
    save_slices(run, 3, odd_contents(5), odd_contents(6))
    harm(run.checkpoint(6), run.checkpoint(5))
    with pytest.raises(CheckpointCorruptError):
        open_part(run.checkpoint(6) / "model.safetensors")


def test_retention_slims_slices_and_finishes_what_a_crash_left(run: RunDirectory) -> None:
    policies = (KeepLast(1), KeepTopK(2, "accuracy", "max"))
    with managing_slices(run, 3, policies) as (manager, others):
        for step in (5, 6, 7):
            contents = replace(odd_contents(step), trigger="epoch", metrics={"accuracy": step / 9})
            others.contents = contents
            manager.save(contents, wait=True)
    assert not run.checkpoint(5).exists()
    slim, full = run.checkpoint(6), run.checkpoint(7)
    manifest = verify(slim)
    assert (manifest.kind, manifest.format_version) == ("weights", 2)
    assert {part_name(path.name) for path in slim.iterdir()} & RESUME_FILES == set()
    assert manifest.shapes.keys() == {"model", "ema"}
    shutil.copy(full / "optimizer-00002-of-00003.safetensors", slim)
    with managing_slices(run, 2, policies) as (manager, _):
        assert manager.restore() is not None
    assert not (slim / "optimizer-00002-of-00003.safetensors").exists()
    assert_same({**odd_tensors(6), "model": load_weights(slim)}, 6)


def test_a_light_checkpoint_of_slices_has_weights_alone(run: RunDirectory) -> None:
    contents = replace(odd_contents(5), trigger="light", kind="weights", metrics={"accuracy": 1.0})
    with managing_slices(run, 2, (KeepTopK(2, "accuracy", "max"),)) as (manager, others):
        others.contents = contents
        manager.save(contents, wait=True)
    manifest = verify(run.checkpoint(5))
    assert {part_name(name) for name in manifest.files} == {"model.safetensors", "ema.safetensors"}


def test_a_run_goes_on_from_whole_files_with_slices_and_back(run: RunDirectory) -> None:
    with managing(run) as manager:
        manager.save(odd_contents(5), wait=True)
    with managing_slices(run, 3) as (sliced, others):
        restored = sliced.restore()
        assert restored is not None
        assert_same(restored.tensors, 5)
        others.contents = odd_contents(6)
        sliced.save(others.contents, wait=True)
    with managing(run, KEEP_ALL) as manager:
        restored = manager.restore()
        assert restored is not None
        assert_same(restored.tensors, 6)


def test_the_digest_of_a_part_is_what_lies_on_the_disk(run: RunDirectory) -> None:
    save_slices(run, 3, odd_contents(5))
    manifest, path = read_manifest(run.checkpoint(5)), run.checkpoint(5) / "model.safetensors"
    assert digest_of_part(path, "blake3") == manifest.digest_of(path.name)
    file = run.checkpoint(5) / "model-00003-of-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert digest_of_part(path, "blake3") != manifest.digest_of(path.name)
    assert joint_digest({"one": "blake3:00"}) == "blake3:00"


def test_nothing_of_it_is_in_a_manifest_without_slices(run: RunDirectory) -> None:
    with managing(run) as manager:
        manager.save(odd_contents(5), wait=True)
    fields = json.loads((run.checkpoint(5) / MANIFEST_NAME).read_bytes())
    assert fields["format_version"] == 1
    assert "shapes" not in fields


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_what_is_written_here(run: RunDirectory) -> None:
    """Its reader of safetensors puts slices together, so that nobody depends on this program."""
    save_slices(run, 3, odd_contents(5))
    expected = {
        name: tensor
        for inner in odd_tensors(5).values()
        for name, tensor in inner.items()
        if name != "tied" and tensor.numel()  # tied ones are there once; it knows no empty ones
    }
    found = {name: torch.full_like(tensor, 1) for name, tensor in expected.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(run.checkpoint(5))), no_dist=True)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
