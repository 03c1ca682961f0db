"""Runs of what people write: what is right stays exact, what cannot be is told in one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.training.champion.candidates import run_candidates
from holdfast.training.champion.selection import run_evaluation
from holdfast.training.checkpointing.loading import load_weights
from holdfast.training.checkpointing.manifest import MANIFEST_NAME, read_manifest
from holdfast.training.errors import (
    CheckpointMismatchError,
    ConfigError,
    ExperimentError,
    NonFiniteLossError,
    NonFiniteStateError,
    OutOfMemoryError,
)
from holdfast.training.loop.revalidation import relative_change
from holdfast.training.loop.segment import run_segment
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.stage import Stage, StageArguments, prepared_stage

EXPERIMENTS = Path(__file__).with_name("odd_experiments.py")


@contextmanager
def staged(name: str, store: Path, *overrides: str, **arguments: Any) -> Iterator[Stage]:
    asked = StageArguments(
        f"{EXPERIMENTS}:{name}",
        store,
        "one",
        1,
        overrides=overrides,
        progress_format="none",
        **arguments,
    )
    with prepared_stage(asked) as stage:
        yield stage


def train(name: str, store: Path, *overrides: str, **arguments: Any) -> RunDirectory:
    with staged(name, store, *overrides, **arguments) as stage:
        assert run_segment(stage).outcome == "completed"
        return stage.run


def steps(store: Path) -> list[str]:
    return sorted(path.name for path in store.glob("*/one/checkpoints/step-*"))


@pytest.mark.parametrize(("every_steps", "kept"), [(1, 12), (3, 12), (5, 10)])
def test_a_state_that_is_not_finite_is_not_saved(
    every_steps: int, kept: int, tmp_path: Path
) -> None:
    every = f"checkpoint.every_steps={every_steps}"
    is_seen = every_steps == 1
    kind = NonFiniteStateError if is_seen else NonFiniteLossError
    with pytest.raises(kind) as caught:
        train("InfiniteSlope", tmp_path, every, "checkpoint.is_auto=false")
    message = str(caught.value)
    if is_seen:
        assert message.startswith("the parameter 0.weight is not finite any more")
        assert "it began after step 13; the losses were finite" in message
        assert "of the last gradient that of 0.weight is not finite" in message
    else:
        assert (
            "the loss of step 14 (batch 5 of its pass over the data) is nan; 0.weight was not"
            in message
        )
    assert steps(tmp_path)[-1] == f"step-{kept:08}"


def test_where_no_gradient_is_to_blame_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteStateError) as caught:
        train("Overflowing", tmp_path, "checkpoint.every_steps=5", "checkpoint.is_auto=false")
    assert "the parameter 2.bias is not finite any more: it began" in str(caught.value)
    assert "it began in steps 1 to 5; the losses" in str(caught.value)
    assert "of the last gradient is finite" in str(caught.value)


def test_an_optimizer_that_is_not_finite_is_not_saved_either(tmp_path: Path) -> None:
    every = ("checkpoint.every_steps=3", "checkpoint.is_auto=false")
    with pytest.raises(NonFiniteStateError) as caught:
        train("BadMomentum", tmp_path, *every)
    assert str(caught.value).startswith("optimizer.0.weight/exp_avg_sq is not finite after step 8")
    assert steps(tmp_path)[-1] == "step-00000006"


@pytest.mark.parametrize(
    ("clip", "optimizer"),
    [
        ("train.max_steps=16", "AdamW"),
        ("train.clip_norm=0.5", "Adagrad"),
        ("train.clip_norm=0.5", "SGD"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("train.clip_norm=0.5", "AdamW"),
                ("train.max_steps=16", "Adagrad"),
                ("train.max_steps=16", "SGD"),
            ]
        ),
    ],
)
def test_a_layer_that_is_unfrozen_is_trained_and_resumed(
    clip: str, optimizer: str, tmp_path: Path
) -> None:
    options = (clip, f"optimizer.name={optimizer}", "optimizer.args.lr=0.1")
    calm = train("Unfreezing", tmp_path / "calm", *options, "checkpoint.every_steps=10")
    first = load_weights(calm.checkpoint(10))["0.weight"]
    torch.manual_seed(0)
    assert not torch.equal(load_weights(calm.checkpoint(16))["0.weight"], first)
    cut = train("Unfreezing", tmp_path / "cut", *options, "checkpoint.every_steps=10")
    for path in cut.checkpoints.glob("step-*16"):
        path.rename(tmp_path / "gone")
    train("Unfreezing", tmp_path / "cut", *options)
    for name in ("state.json", "model.safetensors", "optimizer.safetensors", "state.safetensors"):
        mine, its = (run.checkpoint(16) / name for run in (calm, cut))
        assert mine.read_bytes() == its.read_bytes(), name


@pytest.mark.parametrize(
    ("name", "override", "kind", "told"),
    [
        ("OneLeft", "train.num_epochs=1", ExperimentError, "data.should_drop_last=true"),
        ("SparseGradients", "train.clip_norm=1.0", ConfigError, "that of 0.weight is sparse"),
        ("NothingToValidate", "train.num_epochs=1", ExperimentError, "has no samples"),
        ("Lazy", "train.num_epochs=1", ExperimentError, "0.weight of the model Sequential has no"),
        ("TooLarge", "train.num_microbatches=1", OutOfMemoryError, "train.num_microbatches=2"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    name: str, override: str, kind: type[Exception], told: str, tmp_path: Path
) -> None:
    options = ("optimizer.name=SGD", override)
    with pytest.raises(kind, match=told) as caught:
        train(name, tmp_path, *options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_lazy_layers_that_were_run_once_are_layers_like_others(tmp_path: Path) -> None:
    train("LazyButRun", tmp_path, "train.num_epochs=1")
    with staged("LazyButRun", tmp_path, "train.num_epochs=1") as stage:
        assert run_candidates(stage).outcome == "completed"


def test_an_experiment_with_state_is_restored_in_the_stages_after_training(tmp_path: Path) -> None:
    train("Counting", tmp_path)
    with staged("Counting", tmp_path) as stage:
        assert run_candidates(stage).outcome == "completed"
    with staged("Counting", tmp_path) as stage:
        assert run_evaluation(stage).outcome == "completed"
        evaluation = json.loads(stage.run.evaluation_json.read_text())
    assert {one["validation"]["calls"] for one in evaluation["candidates"]} == {16.0}
    assert evaluation["test"]["metrics"]["calls"] == 16.0


def saved_elsewhere(run: RunDirectory, step: int) -> None:
    """As if another version of torch had saved a checkpoint."""
    manifest = read_manifest(run.checkpoint(step))
    other = manifest.model_copy(update={"versions": {**manifest.versions, "torch": "1.0"}})
    (run.checkpoint(step) / MANIFEST_NAME).write_bytes(other.to_bytes())


def spoil_metrics(run: RunDirectory, step: int, by: float) -> None:
    """Have the history of a checkpoint say that the last validation went otherwise."""
    from holdfast.training.checkpointing.digests import digest_of
    from holdfast.training.checkpointing.manifest import FileEntry

    path = run.checkpoint(step) / "state.json"
    state = json.loads(path.read_text())
    state["history"][-1]["metrics"]["loss"] *= 1 + by
    path.write_text(json.dumps(state))
    manifest = read_manifest(run.checkpoint(step))
    content = path.read_bytes()
    files = {
        **manifest.files,
        "state.json": FileEntry(size_bytes=len(content), digest=digest_of([content])),
    }
    changed = manifest.model_copy(update={"files": files})
    (run.checkpoint(step) / MANIFEST_NAME).write_bytes(changed.to_bytes())


@pytest.mark.parametrize("stop", [8, 11])
def test_where_other_libraries_go_on_the_last_validation_is_repeated(
    stop: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    options = ("checkpoint.every_steps=11", "checkpoint.is_auto=false", "checkpoint.keep_last=3")
    run = train("Counting", tmp_path, *options)
    before = (run.checkpoint(16) / "optimizer.safetensors").read_bytes()
    for step in {8: (11, 16), 11: (16,)}[stop]:
        run.checkpoint(step).rename(tmp_path / f"gone-{step}")
    saved_elsewhere(run, stop)
    train("Counting", tmp_path, *options)
    [told] = [r.getMessage() for r in caplog.records if "was repeated" in r.getMessage()]
    assert told.startswith(
        "the validation of step 8 was repeated on this machine: calls 8 there, 8"
    )
    # That it was repeated changes nothing.
    assert (run.checkpoint(16) / "optimizer.safetensors").read_bytes() == before


def test_a_metric_that_changed_too_much_is_refused_unless_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train("Plain", tmp_path)
    run.checkpoint(16).rename(tmp_path / "gone")
    saved_elsewhere(run, 8)
    spoil_metrics(run, 8, by=0.1)
    with pytest.raises(CheckpointMismatchError, match=r"of step 8 changed by 9\.09%"):
        train("Plain", tmp_path)
    train("Plain", tmp_path, should_allow_mismatch=True)
    assert "allows 2.00%; allowed" in caplog.text


def test_a_bound_of_one_s_own_lets_it_go_on(tmp_path: Path) -> None:
    run = train("Plain", tmp_path)
    run.checkpoint(16).rename(tmp_path / "gone")
    saved_elsewhere(run, 8)
    spoil_metrics(run, 8, by=0.1)
    train("Plain", tmp_path, "checkpoint.max_metric_change=0.2")


def test_changes_of_metrics() -> None:
    nan, inf = float("nan"), float("inf")
    assert relative_change(2.0, 1.0) == 0.5
    assert relative_change(0.0, 0.0) == relative_change(nan, nan) == relative_change(inf, inf) == 0
    assert relative_change(1.0, nan) == relative_change(inf, 1.0) == inf


@pytest.mark.parametrize(
    "override",
    [
        "selection.should_recompute_batch_norm=false",
        "ema.posthoc_widths=[0.2]",
        pytest.param('selection.candidates=["average"]', marks=pytest.mark.slow),
        pytest.param("selection.batch_norm_steps=3", marks=pytest.mark.slow),
    ],
)
def test_what_changes_only_the_choice_may_be_changed_after_training(
    override: str, tmp_path: Path
) -> None:
    run = train("Plain", tmp_path)
    record = run.run_json.read_bytes()
    train("Plain", tmp_path, override)
    with staged("Plain", tmp_path, override) as stage:
        assert run_candidates(stage).outcome == "completed"
        assert run_evaluation(stage).outcome == "completed"
    with staged("Plain", tmp_path, override, is_resume=True) as stage:
        assert run_candidates(stage).outcome == "completed"
    assert run.run_json.read_bytes() == record
    assert read_manifest(run.checkpoint(16)).config_digest == stage.record.config_digest
