"""Epochs of so many steps, light checkpoints, thresholds: calm and stopped, the same bytes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from holdfast.training.champion.candidate_plan import plan_candidates
from holdfast.training.checkpointing.manifest import Manifest, read_manifest
from holdfast.training.checkpointing.policy import KeepTopK
from holdfast.training.configuration.loading import config_from_record
from holdfast.training.runs.directory import read_run_record
from holdfast.training.runs.paths import RunDirectory, parse_step
from tests.faults.campaign import Training, complete, differences, final_state
from tests.generality.harness import OFTEN, assert_exact, stop_after
from tests.generality.noisy_points import NOTICE, NUM_STEPS

EXPERIMENT = f"{Path(__file__).with_name('noisy_points.py')}:Classified"
LIGHT = (
    "train.num_epochs=6",
    "checkpoint.every_epochs=3",
    "checkpoint.weights_every_epochs=1",
    "checkpoint.weights_every_steps=4",
    "checkpoint.every_steps=9",
    "warmup.num_epochs=1",
)


def train(folder: Path, *overrides: str) -> RunDirectory:
    training = Training(folder, "one", EXPERIMENT, (*OFTEN, *overrides))
    complete(training)
    return training.run


def manifests(run: RunDirectory) -> dict[int, Manifest]:
    steps = [step for path in run.checkpoints.iterdir() if (step := parse_step(path.name))]
    return {step: read_manifest(run.checkpoint(step)) for step in sorted(steps)}


def chosen(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """The checkpoints that candidates are made of: metrics, and digests of what is in them."""
    found = manifests(run)
    best = KeepTopK(3, "loss", "min").keep([manifest.info for manifest in found.values()])
    files = ("model.safetensors", "ema.safetensors")
    return {
        step: {
            "metrics": found[step].metrics,
            "epoch": found[step].epoch,
            "trigger": found[step].trigger,
            **{name: found[step].files[name].digest for name in files},
        }
        for step in sorted(best)
    }


def weights(run: RunDirectory, step: int) -> bytes:
    return (run.checkpoint(step) / "model.safetensors").read_bytes()


def planned(run: RunDirectory) -> list[Any]:
    return plan_candidates(run, config_from_record(read_run_record(run).config))


def test_an_epoch_of_so_many_steps_is_exact(tmp_path: Path) -> None:
    run = assert_exact(
        EXPERIMENT,
        tmp_path,
        (
            "train.steps_per_epoch=5",
            "train.num_epochs=12",
            "scheduler.name=CosineAnnealingLR",
            "scheduler.args.T_max=12",
            "warmup.num_epochs=1",
        ),
    )
    history = json.loads((run.checkpoint(60) / "state.json").read_text())["history"]
    assert [entry["step"] for entry in history] == list(range(5, 61, 5))
    rates = [entry["learning_rate"] for entry in history]
    assert rates[0] == 0.01, "the warm-up is one epoch of five steps"
    assert rates[-1] < rates[5] < rates[0]


@pytest.mark.slow
def test_the_samples_go_on_over_the_passes_of_the_data(tmp_path: Path) -> None:
    passes = train(tmp_path / "passes", "train.num_epochs=3")
    whole = train(
        tmp_path / "whole", f"train.steps_per_epoch={3 * NUM_STEPS}", "train.num_epochs=1"
    )
    assert weights(whole, 39) == weights(passes, 39)
    ended = train(
        tmp_path / "ended", "train.steps_per_epoch=5", "train.num_epochs=9", "train.max_steps=39"
    )
    assert weights(ended, 39) == weights(passes, 39)


@pytest.mark.slow
def test_light_checkpoints_are_exact_and_nothing_begins_with_them(tmp_path: Path) -> None:
    calm = train(tmp_path / "calm", *LIGHT)
    light = [m for m in manifests(calm).values() if m.kind == "weights"]
    assert light
    assert all(set(m.files) == {"model.safetensors", "ema.safetensors"} for m in light)
    assert all(m.metrics and m.trigger in ("light", "epoch") for m in light)
    stopped = Training(tmp_path / "stopped", "one", EXPERIMENT, (*OFTEN, *LIGHT))
    for number, step in ((signal.SIGKILL, 14), (signal.SIGTERM, 30), (signal.SIGKILL, 48)):
        stop_after(stopped, number, step)
        newest = max(s for s, m in manifests(stopped.run).items() if m.kind == "full")
        begun = stopped.start()
        restored = begun.wait_for("restored")
        begun.kill(signal.SIGKILL)
        begun.finish()
        assert restored is not None
        assert restored["step"] == newest
    complete(stopped)
    assert differences(final_state(calm), final_state(stopped.run)) == []
    assert chosen(calm) == chosen(stopped.run)
    assert planned(calm) == planned(stopped.run)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_notice_in_a_light_validation_is_exact(tmp_path: Path, count: int) -> None:
    """In the middle of one, in its last batch, and in the second one."""
    calm = train(tmp_path / "calm", *LIGHT)
    stopped = Training(tmp_path / "stopped", "one", EXPERIMENT, (*OFTEN, *LIGHT))
    segment = stopped.start({NOTICE: str(count)})
    assert segment.finish() == 75, "".join(segment.errors)
    step = 4 if count < 4 else 8
    found = manifests(stopped.run)[step]
    is_measured = count == 3
    assert (found.kind, found.trigger) == ("full", "light" if is_measured else "notice")
    complete(stopped)
    assert differences(final_state(calm), final_state(stopped.run)) == []
    assert chosen(calm) == chosen(stopped.run)


@pytest.mark.slow
def test_a_light_checkpoint_may_win(tmp_path: Path) -> None:
    run = train(tmp_path, *LIGHT)
    (best,) = [candidate for candidate in planned(run) if candidate.name == "best"]
    measured = {s: m.metrics["loss"] for s, m in manifests(run).items() if m.info.is_selectable}
    assert best.steps == [min(measured, key=lambda step: (measured[step], step))]
    assert any(step % NUM_STEPS for step in chosen(run)), "one of the best was saved in an epoch"


@pytest.mark.slow
def test_a_threshold_saves_and_never_changes_the_choice(tmp_path: Path) -> None:
    seldom = ("checkpoint.every_epochs=6", "checkpoint.every_steps=1000")
    plain = train(tmp_path / "plain", *seldom)
    state = json.loads((plain.checkpoint(78) / "state.json").read_text())
    losses = [entry["metrics"]["loss"] for entry in state["history"]]
    threshold = (losses[1] + losses[2]) / 2
    assert losses[1] > threshold > losses[2], "the loss falls"
    keep = f"checkpoint.keep_below={{loss={threshold!r}}}"
    calm = train(tmp_path / "calm", *seldom, keep)
    saved = manifests(calm)
    assert list(saved) == [39, 78], "only the first crossing is saved"
    assert (saved[39].kind, saved[39].trigger) == ("full", "threshold")
    assert saved[39].metrics["loss"] == losses[2]
    assert planned(calm) == planned(plain)
    stopped = Training(tmp_path / "stopped", "one", EXPERIMENT, (*OFTEN, *seldom, keep))
    for number, step in ((signal.SIGKILL, 20), (signal.SIGKILL, 50), (signal.SIGTERM, 60)):
        stop_after(stopped, number, step)
    complete(stopped)
    assert differences(final_state(calm), final_state(stopped.run)) == []
    assert manifests(stopped.run)[39].info == saved[39].info
    assert planned(stopped.run) == planned(plain)
