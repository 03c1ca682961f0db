"""Many that want one run, and writers that sleep through a take-over: one writes, and exactly."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.faultpoints import FAULT_POINTS
from tests.faults.campaign import Segment, Training, complete, differences, final_state
from tests.training.checkpointing.checkpoints import flip_bit

NUM_STARTS = 20
TIMEOUT_S = 120.0
OFTEN = ("checkpoint.every_steps=5", "train.num_epochs=4")
SOON_OVERDUE = (*OFTEN, "preemption.lease_ttl_s=1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    training = Training(tmp_path_factory.mktemp("calm"), "calm", overrides=OFTEN)
    complete(training)
    return final_state(training.run)


@pytest.mark.parametrize("is_begun", [False, True], ids=["new", "begun"])
def test_of_many_starts_at_once_one_trains(
    tmp_path: Path, calm: dict[str, bytes], is_begun: bool
) -> None:
    training = Training(tmp_path, "wanted", overrides=OFTEN)
    if is_begun:
        first = training.start({"HOLDFAST_FAULT_POINT": "commit.after-flush:3"})
        assert first.finish() == -signal.SIGKILL
    segments = [training.start() for _ in range(NUM_STARTS)]
    codes = [segment.finish() for segment in segments]
    # Who comes when all is done finds nothing left to do.
    assert 0 in codes
    refused = [segment for segment, code in zip(segments, codes, strict=True) if code]
    assert {code for code in codes if code} <= {1}
    assert all("lease" in segment.errors[-1] for segment in refused), refused
    assert differences(calm, final_state(training.run)) == []
    trained = [s for s in read_segments(training.run) if (s.end_step or 0) > s.start_step]
    assert len(trained) == 1 + is_begun


@pytest.mark.parametrize("point", [name for name in FAULT_POINTS if name[:7] != "replace"])
def test_a_writer_that_sleeps_at_any_point_changes_nothing_when_it_wakes_up(
    tmp_path: Path, calm: dict[str, bytes], point: str
) -> None:
    training = Training(tmp_path, "slept", overrides=SOON_OVERDUE)
    if point.startswith("restore."):
        begun = training.start({"HOLDFAST_FAULT_POINT": "commit.after-flush:3"})
        assert begun.finish() == -signal.SIGKILL
        newest = max(training.run.checkpoints.glob("step-*"))
        flip_bit(newest / "model.safetensors")
    sleeper = training.start(
        {"HOLDFAST_FAULT_POINT": f"{point}:1", "HOLDFAST_FAULT_SIGNAL": "SIGSTOP"}
    )
    wait_until_asleep(sleeper)
    time.sleep(1.5)
    complete(training)
    before = final_state(training.run)
    sleeper.kill(signal.SIGCONT)
    assert sleeper.finish() == 1, "".join(sleeper.errors)
    assert "no longer writes" in sleeper.errors[-1]
    assert differences(before, final_state(training.run)) == []
    assert differences(calm, before) == []


def wait_until_asleep(segment: Segment) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    stat = Path(f"/proc/{segment.process.pid}/stat")
    while segment.process.poll() is None and time.monotonic() < deadline_s:
        if stat.read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.02)
    raise AssertionError(f"did not come to the point\n{''.join(segment.errors)}")
