"""Tensor files and checkpoints of a stranger: refused by name, and the one before is used."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.loading import RestoredCheckpoint
from holdfast.training.checkpointing.manifest import DIGEST_KEY
from holdfast.training.checkpointing.tensor_file import parse_tensors
from holdfast.training.errors import CheckpointCorruptError
from holdfast.training.exactness.seeding import capture_generators
from holdfast.training.loop.state_validation import validate_state
from holdfast.training.runs.durable_json import json_bytes
from holdfast.training.runs.paths import RunDirectory
from tests.safety.hostile import ODD_VALUES, SPECIAL, changed, digest_of_tree, put_special, within
from tests.training.checkpointing.checkpoints import (
    assert_holds,
    contents_at,
    managing,
    names,
    save_steps,
)

LIMIT_S = 10.0
HEADER: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]},
}
DATA = bytes(19)


def tensor_file(header: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    num_bytes = len(header) if length is None else length
    return num_bytes.to_bytes(8, "little", signed=num_bytes < 0) + header + data


def entry(name: str = "a", **fields: Any) -> bytes:
    header = {**HEADER, name: {**HEADER.get(name, HEADER["a"]), **fields}}
    return json.dumps(header).encode()


def made_by_hand() -> Iterator[bytes]:
    good = json.dumps(HEADER).encode()
    yield from (b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8, tensor_file(b""), tensor_file(good)[:-1])
    yield from (tensor_file(good, length=n) for n in (2**63 - 1, 10**9, len(good) - 1, 1))
    yield tensor_file(good, DATA + b"\0")
    for text in (b"[]", b"5", b"null", b'"x"', b"{", b"\xff", b"[" * 10**5, b'{"a":' * 10**5):
        yield tensor_file(text)
    yield tensor_file(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}")
    shapes = ([2, -2], [-1, -1], [2**62, 4], [0, 2**70], [2.0, 2], [True, 4], "22", {"2": 2}, 4)
    yield from (tensor_file(entry(shape=shape)) for shape in (*shapes, None, [[2, 2]], [1] * 10**4))
    for dtype in ("F33", "", None, 5, ["F32"], {}):
        yield tensor_file(entry(dtype=dtype))
    offsets = ([0, 15], [0, 17], [16, 0], [-16, 0], [1, 17], [0], [0, 16, 32], "ab", None, [0, 1e9])
    yield from (tensor_file(entry(data_offsets=offset)) for offset in offsets)
    yield tensor_file(entry("c", data_offsets=[0, 16]))  # two in one place
    aliases = (
        "x",
        "[]",
        "5",
        '{"c": "gone"}',
        '{"c": 5}',
        '{"c": ["a"]}',
        "[" * 10**5,
        None,
        5,
        {},
    )
    for alias in aliases:
        yield tensor_file(json.dumps({**HEADER, "__metadata__": {"aliases": alias}}).encode())
    for metadata in ([], "x", 5, None):
        yield tensor_file(json.dumps({**HEADER, "__metadata__": metadata}).encode())


def made_from_seeds(num: int) -> Iterator[bytes]:
    rng = random.Random(7)
    for _ in range(num):
        header = changed(rng, HEADER, rng.choice(ODD_VALUES))
        yield tensor_file(header, rng.choice((DATA, b"", DATA * 2)))


def test_no_tensor_file_ends_in_anything_but_one_typed_error() -> None:
    files = [*made_by_hand(), *made_from_seeds(200)]
    told: list[str] = []
    for number, content in enumerate(files):
        memory = (
            torch.frombuffer(bytearray(content or b"\0")[: len(content)], dtype=torch.uint8)
            if (content)
            else torch.empty(0, dtype=torch.uint8)
        )
        with within(LIMIT_S):
            try:
                parse_tensors(memory, f"file {number}")
            except CheckpointCorruptError as error:
                told.append(str(error))
    assert len(told) >= 200
    assert all("is not a safetensors file" in text for text in told)


def deep_header(folder: Path) -> None:
    replace(folder, "model.safetensors", tensor_file(b'{"a":' + b"[" * 10**5))


def deep_state(folder: Path) -> None:
    replace(folder, "state.json", b"[" * 10**6)


def infinite_state(folder: Path) -> None:
    replace(folder, "state.json", b'{"counters": {"step": 1e999}}')


def special_file(folder: Path, name: str, kind: str) -> None:
    put_special(folder / name, kind, folder.parent.parent / "elsewhere")


def deep_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"[" * 10**6)


def huge_claim(folder: Path) -> None:
    """A state that claims 4 TiB, by a manifest that is right about it but for the digest."""
    put_special(folder / "state.json", "sparse", folder)
    fields = json.loads((folder / "manifest.json").read_bytes())
    fields["files"]["state.json"]["size_bytes"] = (folder / "state.json").stat().st_size
    seal(folder, fields)


def link_for_folder(folder: Path) -> None:
    elsewhere = folder.parent.parent / "elsewhere-checkpoint"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def replace(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    fields = json.loads((folder / "manifest.json").read_bytes())
    fields["files"][name] = {"size_bytes": len(content), "digest": digest_of([content])}
    seal(folder, fields)


def seal(folder: Path, fields: dict[str, Any]) -> None:
    fields.pop(DIGEST_KEY)
    sealed = {**fields, DIGEST_KEY: digest_of([json_bytes(fields)])}
    (folder / "manifest.json").write_bytes(json_bytes(sealed))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deep header": deep_header,
    "deep state": deep_state,
    "infinite state": infinite_state,
    "deep manifest": deep_manifest,
    "huge claim": huge_claim,
    "link for folder": link_for_folder,
    **{
        f"{name} is {kind}": lambda folder, name=name, kind=kind: special_file(folder, name, kind)  # type: ignore[misc]
        for name in ("manifest.json", "state.json", "optimizer.safetensors")
        for kind in SPECIAL
    },
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "digits" / "a")
    save_steps(run, 10, 20)
    (run.path / "elsewhere").write_bytes(b"precious")
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_forged_checkpoint_is_set_aside_and_the_one_before_is_used(
    run: RunDirectory, damage: str
) -> None:
    DAMAGES[damage](run.checkpoint(20))
    with within(LIMIT_S), managing(run) as manager:
        restored = manager.restore()
    assert restored is not None
    assert_holds(restored.tensors, 10)
    assert names(run.checkpoints) == ["step-00000010", "step-00000020.damaged-1"]
    assert (run.path / "elsewhere").read_bytes() == b"precious"


def test_nothing_is_slimmed_or_pruned_behind_a_link(run: RunDirectory) -> None:
    link_for_folder(run.checkpoint(10))
    outside = digest_of_tree(run.path / "elsewhere-checkpoint")
    with managing(run, policies=()) as manager:  # keeps nothing
        manager.save(contents_at(30), wait=True)
    assert digest_of_tree(run.path / "elsewhere-checkpoint") == outside


@pytest.mark.parametrize("name", ["checkpoints", ".staging", "lease", "segments", "candidates"])
def test_a_run_whose_folder_is_a_link_is_not_written(run: RunDirectory, name: str) -> None:
    folder = run.path / name
    folder.mkdir(exist_ok=True)
    folder.rename(run.path / "elsewhere-folder")
    folder.symlink_to(run.path / "elsewhere-folder")
    (run.path / "elsewhere-folder/00000000-0123456789abcdef").mkdir()
    outside = digest_of_tree(run.path / "elsewhere-folder")
    with pytest.raises(OSError, match=rf"{name} is a link, expected a folder of the run's own"):
        save_steps(run, 30)
    assert digest_of_tree(run.path / "elsewhere-folder") == outside


def whole_state(run: RunDirectory) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    generators = {**capture_generators(), "loss_sum": torch.zeros((), dtype=torch.float64)}
    tensors = {"model": {"w": torch.zeros(3)}, "optimizer": {}, "state": generators}
    epoch = {"epoch": 1, "step": 20, "train_loss": 0.5, "learning_rate": 0.1, "metrics": {"a": 1.0}}
    return tensors, {
        "counters": {"step": 20, "epoch": 2, "step_in_epoch": 0},
        "early_stopping": {"best": None, "num_epochs_since_best": 0},
        "ema": {"tracks": []},
        "experiment": {"kept": {"$tensor": "torch.cpu"}, "pair": {"$tuple": [1, 2]}},
        "gradient_scaler": {},
        "history": [epoch],
        "loss_sum": {"$tensor": "loss_sum"},
        "model": {},
        "optimizer": {"groups": [{"params": ["w"], "options": {"lr": 0.1}}], "parameters": {}},
        "scheduler": {
            "num_steps": 20,
            "scheduler": {},
            "trace": {"every": 1, "points": [[1, 0.1]]},
        },
    }


def restored_with(
    run: RunDirectory, tensors: dict[str, dict[str, Tensor]], state: Any
) -> RestoredCheckpoint:
    with managing(run) as manager:
        found = manager.restore()
    assert found is not None
    return RestoredCheckpoint(found.manifest, tensors, state, found.path)


def test_states_that_nobody_saved_are_refused_before_anything_is_put_back(
    run: RunDirectory,
) -> None:
    tensors, state = whole_state(run)
    template = restored_with(run, tensors, state)
    validate_state(template)
    rng = random.Random(3)
    told: list[str] = []
    for _ in range(300):
        odd = json.loads(changed(rng, state, rng.choice(ODD_VALUES)))
        try:
            with within(LIMIT_S):
                validate_state(RestoredCheckpoint(template.manifest, tensors, odd, template.path))
        except CheckpointCorruptError as error:
            told.append(str(error))
    assert len(told) > 150
    assert all("state.json cannot be put back" in text for text in told)


def poke(name: str, index: int, value: int) -> Callable[[dict[str, Tensor]], None]:
    def act(generators: dict[str, Tensor]) -> None:
        generators[name][index] = value

    return act


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def act(generators: dict[str, Tensor]) -> None:
        generators[name] = tensor

    return act


@pytest.mark.parametrize(
    "forge",
    [
        poke("numpy.words", 624, 2**31 - 1),
        poke("numpy.words", 624, -1),
        poke("numpy.words", 0, 2**40),
        poke("numpy.words", 625, 7),
        poke("random.words", 625, 10**6),
        poke("random.words", 0, 99),
        poke("random.words", 5, -5),
        poke("torch.cpu", 8, 0),
        poke("torch.cpu", 17, 0xFF),
        put("torch.cpu", torch.zeros(5056, dtype=torch.uint8)),
        put("torch.cpu", torch.zeros(16, dtype=torch.uint8)),
        put("torch.cpu", torch.zeros(5056)),
        put("numpy.words", torch.zeros(626, dtype=torch.int64)),
        put("numpy.words", torch.zeros((626, 1), dtype=torch.int64)),
        put("random.words", torch.zeros(0, dtype=torch.int64)),
        put("random.gauss", torch.zeros(3)),
        put("torch.cuda.x", torch.zeros(16, dtype=torch.uint8)),
        lambda generators: generators.pop("numpy.gauss"),
    ],
)
def test_a_generator_that_cannot_be_drawn_from_is_never_put_back(
    run: RunDirectory, forge: Callable[[dict[str, Tensor]], None]
) -> None:
    tensors, state = whole_state(run)
    tensors["state"] = {name: tensor.clone() for name, tensor in tensors["state"].items()}
    forge(tensors["state"])
    with pytest.raises(CheckpointCorruptError, match=r"state\.json cannot be put back"):
        validate_state(restored_with(run, tensors, state))


def test_a_checkpoint_that_does_not_validate_is_set_aside(run: RunDirectory) -> None:
    def refuse_twenty(restored: RestoredCheckpoint) -> None:
        if restored.manifest.step == 20:
            raise CheckpointCorruptError("step 20 cannot be put back")

    with managing(run) as manager:
        restored = manager.restore(validate=refuse_twenty)
    assert restored is not None
    assert restored.manifest.step == 10
    assert names(run.checkpoints) == ["step-00000010", "step-00000020.damaged-1"]


def test_a_holder_that_was_stopped_before_it_sets_aside_changes_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes up when another one has taken over, and has saved a good checkpoint in its place."""
    import holdfast.training.checkpointing.storage as storage_module

    deep_header(run.checkpoint(20))
    told: list[str] = []

    def taken_over(point: str) -> None:
        told.append(point)
        if point == "restore.before-set-aside" and told.count(point) == 1:
            [name] = [path.name for path in run.staging.iterdir()]
            os.utime(run.lease / f"{name.partition('-')[0]}.json", (0, 0))
            save_steps_as_another(run)

    monkeypatch.setattr(storage_module, "reach", taken_over)
    from holdfast.training.errors import LeaseLostError

    with pytest.raises(LeaseLostError), managing(run) as manager:
        manager.restore()
    assert names(run.checkpoints) == ["step-00000010", "step-00000020"]
    with managing(run) as manager:
        restored = manager.restore()
    assert restored is not None
    assert_holds(restored.tensors, 20)


def save_steps_as_another(run: RunDirectory) -> None:
    """Another machine's holder takes the run over, and replaces step 20 by a good one."""
    from dataclasses import replace as with_fields

    from holdfast.training.checkpointing.manager import CheckpointManager
    from holdfast.training.runs.lease import Lease
    from holdfast.training.runs.process_identity import current_process
    from tests.training.checkpointing.checkpoints import IDENTITY, KEEP_ALL

    elsewhere = with_fields(current_process(), boot_id="another")
    with Lease.acquire(run, 30.0, identity=elsewhere) as lease:
        CheckpointManager(run, lease, IDENTITY, KEEP_ALL).save(contents_at(20), wait=True)
