"""Stages that are run until they complete, or fail for good, with real children."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from holdfast.tasks.attempts import AttemptLog
from holdfast.tasks.child import Event
from holdfast.tasks.completion import complete_stage, grace_period_s, wait_for_writer
from holdfast.tasks.job import Job
from holdfast.tasks.limits import Limits
from holdfast.tasks.stage_errors import StageFailedError, StageInputError
from holdfast.training.errors import LeaseHeldError
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.process_identity import ProcessIdentity

LIMITS = Limits(max_crashes=1, crash_backoff_s=0.1)
ELSEWHERE = ProcessIdentity("elsewhere", "another boot", "1", 4711, 1)
BROKEN = """
from holdfast.training.experiments.digits import Digits

class Broken(Digits):
    def loss(self, model, batch):
        raise RuntimeError("the fan has stopped")
"""


@dataclass
class Heard:
    """Keeps what it is told."""

    events: list[Event] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def log(self, line: str) -> None:
        self.lines.append(line)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def broken(tmp_path: Path) -> Job:
    source = tmp_path / "broken.py"
    source.write_text(BROKEN)
    return Job(f"{source}:Broken", tmp_path / "store", "run")


@pytest.mark.slow
def test_a_stage_that_keeps_crashing_fails_with_the_reason_and_the_command(
    broken: Job, heard: Heard
) -> None:
    with pytest.raises(StageFailedError) as failure:
        complete_stage("segment", broken, LIMITS, heard)
    message = str(failure.value)
    assert "RuntimeError: the fan has stopped" in message
    assert "-m holdfast.training segment --experiment" in message
    assert 'raise RuntimeError("the fan has stopped")' in message, "the last lines of its log"
    assert len(heard.warnings) == 1, "it was tried twice"
    endings = [attempt.ending for attempt in AttemptLog(broken.run, "segment").read()]
    assert endings == ["failed", "failed"]


def test_a_stage_that_refuses_its_input_is_not_tried_again(tmp_path: Path, heard: Heard) -> None:
    job = Job("digits", tmp_path / "store", "run", overrides=("train.num_epochs=-1",))
    with pytest.raises(StageInputError, match="num_epochs"):
        complete_stage("segment", job, LIMITS, heard)
    assert heard.warnings == []
    assert not job.run.path.exists(), "nothing is half done"


def test_a_writer_that_still_saves_is_waited_for(broken: Job, heard: Heard) -> None:
    with (
        Lease.acquire(broken.run, 0.3, identity=ELSEWHERE),
        pytest.raises(LeaseHeldError, match="4711 on elsewhere"),
    ):
        wait_for_writer(broken.run, 0.5, heard)
    assert "waiting for process 4711 on elsewhere" in heard.lines[0]
    wait_for_writer(broken.run, 0.5, heard)
    assert len(heard.lines) == 1


def test_a_worker_may_grant_less_time_to_save_than_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert grace_period_s(Limits(grace_period_s=30)) == 30
    monkeypatch.setenv("HOLDFAST_GRACE_PERIOD_S", "24")
    assert grace_period_s(Limits(grace_period_s=30)) == 24
    assert grace_period_s(Limits(grace_period_s=10)) == 10
