"""Candidates of a real training: what they are made of, and that nothing foreign gets in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast.training.averages.averaging import write_weights
from holdfast.training.averages.posthoc_ema import Profile, gamma_of, reconstruct
from holdfast.training.champion.candidate_plan import (
    Candidate,
    metric_weights,
    plan_candidates,
    used_steps,
)
from holdfast.training.champion.candidates import made_digest, run_candidates
from holdfast.training.checkpointing.manifest import read_manifest
from holdfast.training.configuration.loading import config_from_record
from holdfast.training.errors import CheckpointCorruptError, SelectionError
from holdfast.training.loop.segment import run_segment
from holdfast.training.runs.directory import read_run_record
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.stage import Stage, StageArguments, prepared_stage
from tests.faults.campaign import HARD

OVERRIDES = (
    "ema.decays=[0.9]",
    "ema.posthoc_gammas=[16.97,6.94]",
    "ema.posthoc_widths=[0.1,0.15,0.27]",
    "checkpoint.keep_last=1",
    "train.num_epochs=6",
)
AVERAGED = ("ema-decay-0.9", "posthoc-0.1", "posthoc-0.15")
TOP = ("average-top-3", "weighted-top-3", "soup-top-3")
NAMES = ["best", "last", *(f"{n}{bn}" for n in (*AVERAGED, *TOP) for bn in ("", "-bn"))]


@contextmanager
def staged(store: Path, *overrides: str) -> Iterator[Stage]:
    arguments = StageArguments(
        experiment=HARD,
        store=store,
        run_id="first",
        num_threads=1,
        overrides=(*OVERRIDES, *overrides),
        progress_format="none",
    )
    with prepared_stage(arguments) as stage:
        yield stage


def make(store: Path) -> RunDirectory:
    with staged(store) as stage:
        assert run_candidates(stage).exit_code == 0
    return stage.run


def planned(run: RunDirectory) -> dict[str, Candidate]:
    config = config_from_record(read_run_record(run).config)
    return {candidate.name: candidate for candidate in plan_candidates(run, config)}


def content(run: RunDirectory) -> dict[str, bytes]:
    paths = sorted(path for path in run.candidates.rglob("*") if path.is_file())
    return {str(path.relative_to(run.candidates)): path.read_bytes() for path in paths}


def provenance(run: RunDirectory, name: str) -> Any:
    return json.loads((run.candidates / name / "provenance.json").read_bytes())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("trained")
    with staged(store) as stage:
        assert run_segment(stage).exit_code == 0
    return store


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    store = tmp_path_factory.mktemp("made") / "store"
    shutil.copytree(trained, store)
    return make(store)


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "store"))


def run_in(store: Path) -> RunDirectory:
    return RunDirectory(store / "hard_experiment.Hard" / "first")


def test_every_kind_is_made_simplest_first(made: RunDirectory) -> None:
    assert list(planned(made)) == NAMES
    assert {path.name for path in made.candidates.iterdir() if path.is_dir()} == set(NAMES)
    assert all(made_digest(made, candidate) for candidate in planned(made).values())


def test_best_and_last_are_the_checkpoints_to_the_byte(made: RunDirectory) -> None:
    for name in ("best", "last"):
        (step,) = planned(made)[name].steps
        original = (made.checkpoint(step) / "model.safetensors").read_bytes()
        assert (made.candidates / name / "model.safetensors").read_bytes() == original


def test_provenance_tells_files_digests_and_weights(made: RunDirectory) -> None:
    for name, candidate in planned(made).items():
        told = provenance(made, name)
        assert made_digest(made, candidate) == told["digest"]
        for source in told["sources"]:
            manifest = read_manifest(made.checkpoint(source["step"]))
            assert manifest.files[source["file"]].digest == source["digest"]
        assert all(isinstance(source["weight"], float) for source in told["sources"])
        assert (
            (told["base"] is not None) == name.endswith("-bn") == (told["batch_norm"] is not None)
        )
    assert sum(s["weight"] for s in provenance(made, "posthoc-0.1")["sources"]) == pytest.approx(1)
    soup = provenance(made, "soup-top-3")
    kept = {step["step"] for step in soup["greedy_steps"] if step["is_kept"]}
    assert {source["step"] for source in soup["sources"] if source["weight"] == 1.0} == kept
    assert used_steps(soup) == sorted(kept)


def test_what_a_soup_left_out_is_not_in_it(made: RunDirectory) -> None:
    told, steps = provenance(made, "soup-top-3"), planned(made)["soup-top-3"].steps
    told["sources"][1]["weight"] = 0.0
    assert used_steps(told) == [steps[0], steps[2]]


def test_weights_are_averaged_as_provenance_says(made: RunDirectory) -> None:
    for name in TOP:
        sources = provenance(made, name)["sources"]
        weights = load_file(made.candidates / name / "model.safetensors")
        total = sum(source["weight"] for source in sources)
        files = [load_file(made.checkpoint(s["step"]) / s["file"]) for s in sources]
        expected = torch.stack(
            [
                f["4.weight"].double() * (s["weight"] / total)
                for f, s in zip(files, sources, strict=True)
            ]
        ).sum(0)
        assert torch.allclose(weights["4.weight"].double(), expected, rtol=0, atol=1e-7)


def test_recomputing_changes_the_statistics_of_batch_norm_alone(made: RunDirectory) -> None:
    for name in (*AVERAGED, *TOP):
        one, other = (
            load_file(made.candidates / f"{name}{bn}" / "model.safetensors") for bn in ("", "-bn")
        )
        changed = {key for key in one if not torch.equal(one[key], other[key])}
        assert changed == {
            f"{n}.{key}"
            for n in (1, 5)
            for key in ("running_mean", "running_var", "num_batches_tracked")
        }


def test_a_reconstruction_is_the_average_that_training_kept(made: RunDirectory) -> None:
    last = planned(made)["last"].steps[0]
    kept = load_file(made.checkpoint(last) / "ema.safetensors")
    found = load_file(made.candidates / "posthoc-0.1" / "model.safetensors")  # gamma 6.94
    for name in ("0.weight", "4.weight", "1.running_var"):
        average = kept[f"gamma-6.94/{name}"]
        assert (found[name] - average).norm() / average.norm() < 1e-4


def test_making_them_again_changes_nothing(made: RunDirectory) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.candidates.rglob("*.safetensors")}
    make(made.path.parents[1])
    assert before == {p: p.stat().st_mtime_ns for p in made.candidates.rglob("*.safetensors")}


def test_what_was_altered_or_left_over_is_made_anew(made: RunDirectory, store: Path) -> None:
    run = run_in(store)
    shutil.copytree(made.candidates, run.candidates)
    (run.candidates / "soup-top-3" / "model.safetensors").write_bytes(b"altered")
    (run.candidates / "last" / "provenance.json").unlink()
    (run.candidates / "average-top-9").mkdir()
    (run.candidates / "soup-top-9.greedy.json").write_text("{}")
    # Trials of other checkpoints do not count.
    (run.candidates / "soup-top-3.greedy.json").write_text('{"sources": [], "steps": [1]}')
    assert content(make(store)) == content(made)


def test_a_notice_stops_between_trials_and_a_later_process_goes_on(
    made: RunDirectory, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, num_lives, num_asked = run_in(store), 0, 0

    def should_stop(_: Stage) -> bool:
        nonlocal num_asked
        num_asked += 1
        return num_asked > 4 * num_lives  # a later life is longer

    monkeypatch.setattr(Stage, "should_stop", should_stop)
    is_made = False
    while not is_made:
        num_lives, num_asked = num_lives + 1, 0
        with staged(store) as stage:
            is_made = run_candidates(stage).exit_code == 0
    assert num_lives > 5
    assert content(run) == content(made)


def test_a_changed_checkpoint_is_refused_by_name(store: Path) -> None:
    run = run_in(store)
    step = planned(run)["average-top-3"].steps[0]
    path = run.checkpoint(step) / "model.safetensors"
    memory = bytearray(path.read_bytes())
    memory[-1] ^= 1
    path.write_bytes(memory)
    with pytest.raises(CheckpointCorruptError, match=f"step-{step:08d}/model.safetensors was chan"):
        make(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config_digest": "sha256:other"}, "made by the configuration sha256:other"),
        ({"run": "digits/second of 2026"}, "is of the run digits/second of 2026"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    store: Path, change: dict[str, str], message: str
) -> None:
    run = run_in(store)
    folder = run.checkpoint(planned(run)["average-top-3"].steps[0])
    manifest = read_manifest(folder).model_copy(update=change)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(SelectionError, match=rf"{folder.name} .*{message}"):
        make(store)


def test_a_checkpoint_of_another_model_is_refused_by_name(store: Path) -> None:
    run = run_in(store)
    folder = run.checkpoint(planned(run)["average-top-3"].steps[0])
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["4.weight"] = tensors["4.weight"][:5].clone()
    path.unlink()
    write_weights(path, tensors)
    manifest = read_manifest(folder)
    from holdfast.training.checkpointing.digests import digest_of

    entry = manifest.files[path.name].model_copy(update={"digest": digest_of([path.read_bytes()])})
    changed = manifest.model_copy(update={"files": {**manifest.files, path.name: entry}})
    (folder / "manifest.json").write_bytes(changed.to_bytes())
    with pytest.raises(SelectionError, match=rf"cannot average 4\.weight.*{folder.name}"):
        make(store)


def test_snapshots_survive_pruning_and_lost_ones_are_done_without(
    made: RunDirectory, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_in(store)
    every = planned(run)["posthoc-0.1"].steps
    assert len(every) == 6  # one an epoch, though one is kept in full and three for their metric
    keep = set(planned(run)["average-top-3"].steps) | {every[-1]} | set(planned(run)["best"].steps)
    lost = [step for step in every if step not in keep][:1]
    for step in lost:
        shutil.rmtree(run.checkpoint(step))
    plan = planned(run)
    assert plan["posthoc-0.1"].steps == [step for step in every if step not in lost]
    assert "there is no candidate posthoc-0.27" in caplog.text
    make(store)
    one, other = (
        load_file(r.candidates / "posthoc-0.1" / "model.safetensors")["0.weight"]
        for r in (run, made)
    )
    assert (one - other).norm() / other.norm() < 1e-3


def test_a_reconstruction_that_is_too_far_off_is_refused_with_its_error() -> None:
    snapshots = [Profile(100, 16.97), Profile(100, 6.94)]
    with pytest.raises(SelectionError, match=r"width 0\.25 up to step 100 .* off by [\d.]+ of"):
        reconstruct(snapshots, Profile(100, gamma_of(0.25)), 0.1)
    assert reconstruct(snapshots, Profile(100, gamma_of(0.1)), 0.1)


def test_metric_weights_depend_on_neither_unit_nor_offset() -> None:
    values = [0.2, 0.25, 0.45]
    found = metric_weights(values, "min")
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert metric_weights([100 - 3 * v for v in values], "max") == pytest.approx(found)
    assert metric_weights([0.5, 0.5], "min") == [1.0, 1.0]
    assert metric_weights([0.5, float("inf")], "min") == [1.0, 0.0]
    assert metric_weights([float("inf")] * 2, "min") == [1.0, 1.0]
