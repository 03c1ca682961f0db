"""A loss that spikes: back, past it, and to the same bytes however often the run is killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from holdfast.training.exactness.trial import Trial
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.losses import compare_losses
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.spikes.rollbacks import read_rollbacks
from tests.faults.campaign import Segment, Training, differences, final_state

EXPERIMENT = f"{Path(__file__).with_name('spiking.py')}:Spiking"
# Saves at steps that the clock would have chosen; a resume goes back by some steps.
OFTEN = ("checkpoint.every_steps=5", "logging.every_s=0.0001")
NAN_AT_21 = (*OFTEN, "experiment.not_finite_at=[21]", "spikes.num_left_out=8")
JUMPS = (
    *OFTEN,
    "experiment.jump_at=[17,30]",
    "experiment.not_finite_at=[31]",
    "spikes.num_left_out=4",
    "spikes.max_jump=20",
    "spikes.window_steps=10",
)


def run(
    training: Training, environment: dict[str, str] | None = None, *, expected: int = 0
) -> Segment:
    calls = {"CALLS": str(training.store / f"{training.run_id}.calls")}
    segment = training.start({**calls, **(environment or {})})
    code = segment.finish()
    assert code == expected, f"exit code {code}\n{''.join(segment.errors)}"
    return segment


def called(training: Training) -> list[int]:
    text = (training.store / f"{training.run_id}.calls").read_text()
    return [int(line) for line in text.splitlines()]


def newest_state(run: RunDirectory) -> Any:
    return json.loads((sorted(run.checkpoints.iterdir())[-1] / "state.json").read_text())


@pytest.mark.slow
def test_training_goes_back_and_past_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    training = Training(tmp_path, "one", EXPERIMENT, NAN_AT_21)
    segment = run(training)
    steps = called(training)
    # To 21, then on from the newest checkpoint before them, without 14 to 21.
    assert steps[:21] == list(range(1, 22))
    again = steps[21:]
    assert again[-1] == 48
    assert again == [step for step in range(again[0], 49) if not 14 <= step <= 21]
    assert again[0] == 13  # that of the end of the first epoch
    [found] = read_rollbacks(training.run)
    assert (found.step, found.first, found.segment) == (21, 14, 1)
    state = newest_state(training.run)
    assert state["counters"] == {"epoch": 4, "step": 48, "step_in_epoch": 0}
    assert state["spikes"]["rollbacks"] == [
        {"first": 14, "reason": "the loss of step 21 is not finite", "step": 21}
    ]
    assert state["scheduler"]["num_steps"] == 48
    one, other = read_segments(training.run)
    assert (one.outcome, other.outcome, other.start_step) == ("failed", "completed", 12)
    assert one.error is not None
    assert one.error.type == "NonFiniteLossError"
    assert [event["left_out_from"] for event in segment.events if event["event"] == "spike"] == [14]
    assert [event["event"] for event in segment.events].count("outcome") == 1
    assert compare_losses(training.run).num_different == 0


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [NAN_AT_21, JUMPS], ids=["not finite", "jumps"])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, overrides: Sequence[str]
) -> None:
    calm = Training(tmp_path, "calm", EXPERIMENT, tuple(overrides))
    run(calm)
    killed = Training(tmp_path, "killed", EXPERIMENT, (*overrides, "checkpoint.every_steps=3"))
    for environment in (
        Trial(stop_at=13, stop_signal="SIGKILL").environment(),
        {"HOLDFAST_FAULT_POINT": "spike.before-decision"},
        {"HOLDFAST_FAULT_POINT": "spike.after-decision"},
        {"HOLDFAST_FAULT_POINT": "prune.after-rename"},
        {"HOLDFAST_FAULT_POINT": "spike.before-losses"},
        Trial(stop_at=19, stop_signal="SIGKILL").environment(),
        Trial(stop_at=25, stop_signal="SIGKILL").environment(),
        Trial(stop_at=33, stop_signal="SIGKILL").environment(),
    ):
        run(killed, environment, expected=-signal.SIGKILL)
    run(killed)
    assert differences(final_state(calm.run), final_state(killed.run)) == []
    one, other = (
        [(r.step, r.first, r.reason) for r in read_rollbacks(t.run)] for t in (calm, killed)
    )
    assert one == other
    assert compare_losses(killed.run).num_different == 0
    assert compare_losses(killed.run).num_compared > 0


@pytest.mark.slow
def test_too_many_spikes_fail_the_run_in_words(tmp_path: Path) -> None:
    overrides = (*NAN_AT_21, "experiment.not_finite_at=[21,22,24]", "spikes.max_rollbacks=2")
    training = Training(tmp_path, "one", EXPERIMENT, overrides)
    segment = run(training, expected=1)
    [line] = segment.errors[-1:]
    assert "the loss of step 24 is not finite; 2 times training went back already" in line
    assert "(spikes at steps 21, 22), and spikes.max_rollbacks=2 allows no more" in line
    assert run(training, expected=1).events[-1]["error"] == segment.events[-1]["error"]


def test_without_the_policy_a_loss_that_is_not_finite_fails_the_run(tmp_path: Path) -> None:
    training = Training(tmp_path, "one", EXPERIMENT, ("experiment.not_finite_at=[5]",))
    assert "check the data" in run(training, expected=1).errors[-1]
    assert not training.run.rollbacks_json.exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("spikes.num_left_out=12",), "spikes.num_left_out=12 can empty epoch 0, which has 12"),
        (("spikes.num_left_out=0",), "spikes.num_left_out = 0: must be greater than or equal to 1"),
        (("spikes.num_left_out=2", "spikes.max_jump=0.5"), "spikes.max_jump = 0.5"),
        (("spikes.max_jump=3",), "set it, too"),
        (("spikes.num_left_out=2", "distributed.strategy='ddp'"), "is for a training of one"),
        (
            (
                "spikes.num_left_out=11",
                "spikes.max_rollbacks=9",
                "experiment.not_finite_at=[23,24]",
            ),
            "would empty epoch 1 (steps 13 to 24)",
        ),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    tmp_path: Path, overrides: Sequence[str], told: str
) -> None:
    training = Training(tmp_path, "one", EXPERIMENT, tuple(overrides))
    error = run(training, expected=2).errors[-1]
    assert told in error
    assert error.startswith("error: ")
