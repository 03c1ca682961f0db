"""Stages as child processes: outcomes, forwarding of stops, and death with the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from holdfast.tasks.child import StageCommand, run_stage
from holdfast.tasks.job import Job
from holdfast.tasks.stage_errors import StageFailedError, StageInputError, stage_error

SAVING_CHILD = """
import json, signal, sys, time
def stop(*_):
    time.sleep({save_s})
    print(json.dumps({{"event": "outcome", "outcome": "preempted", "step": 7}}), flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print(json.dumps({{"event": "progress", "step": 5, "num_steps": 10}}), flush=True)
print("a line of the log", file=sys.stderr, flush=True)
time.sleep(60)
"""


@dataclass(frozen=True)
class ScriptCommand(StageCommand):
    """A stage whose process runs a script of the test."""

    script: str = ""

    def argv(self) -> list[str]:
        return [sys.executable, "-c", self.script]


class Stopped(BaseException):
    """As Prefect's TerminationSignal."""


def job(tmp_path: Path) -> Job:
    return Job(experiment="digits", store=tmp_path, run_id="r")


def run_script(tmp_path: Path, script: str, grace_period_s: float = 10.0) -> Any:
    events: list[dict[str, Any]] = []
    lines: list[str] = []
    command = ScriptCommand("segment", job(tmp_path), grace_period_s, script)
    return run_stage(command, events.append, lines.append), events, lines, command


def test_a_stage_that_completes_tells_its_events_and_its_log(tmp_path: Path) -> None:
    script = (
        "import json, sys; print(json.dumps({'event': 'saved', 'step': 3})); "
        "print('not an event'); print('log', file=sys.stderr)"
    )
    outcome, events, lines, _ = run_script(tmp_path, script)
    assert (outcome.outcome, outcome.exit_code, outcome.step) == ("completed", 0, 3)
    assert events == [{"event": "saved", "step": 3}]
    assert sorted(lines) == ["log", "not an event"]


@pytest.mark.parametrize(
    ("script", "expected", "exit_code"),
    [
        ("import sys; sys.exit(75)", "preempted", 75),
        ("import sys; sys.exit(1)", "failed", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "failed", -9),
    ],
)
def test_the_exit_code_tells_how_a_stage_ended(
    tmp_path: Path, script: str, expected: str, exit_code: int
) -> None:
    outcome, *_ = run_script(tmp_path, script)
    assert (outcome.outcome, outcome.exit_code) == (expected, exit_code)


def test_a_killed_stage_is_explained_by_the_signal(tmp_path: Path) -> None:
    outcome, *_ = run_script(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert outcome.explain() == "killed by SIGKILL"


def test_a_failed_stage_says_why_how_to_repeat_it_and_how_to_go_on(tmp_path: Path) -> None:
    script = (
        "import json, sys; print(json.dumps({'event': 'outcome', 'outcome': 'failed', "
        "'error': {'type': 'ValueError', 'message': 'the loss is odd'}})); "
        "print('last words', file=sys.stderr); sys.exit(1)"
    )
    outcome, _, _, command = run_script(tmp_path, script)
    error = stage_error(command, outcome)
    assert isinstance(error, StageFailedError)
    for part in ("ValueError: the loss is odd", "holdfast resume r", "last words", "by hand"):
        assert part in str(error)


def test_bad_input_is_told_in_the_childs_own_words(tmp_path: Path) -> None:
    script = (
        "import json, sys; print(json.dumps({'event': 'outcome', 'outcome': 'failed', "
        "'error': {'type': 'ConfigError', 'message': 'unknown key a.b'}})); sys.exit(2)"
    )
    outcome, _, _, command = run_script(tmp_path, script)
    error = stage_error(command, outcome)
    assert isinstance(error, StageInputError)
    assert str(error) == "unknown key a.b"
    assert outcome.is_final


@pytest.mark.parametrize(
    ("kind", "is_final"),
    [
        ("ExportError", True),
        ("OutOfMemoryError", True),
        ("NonFiniteLossError", True),
        ("NonFiniteStateError", True),
        ("CheckDiedError", False),
        ("StorageError", False),
        ("LoaderError", False),
    ],
)
def test_what_would_happen_again_is_final(kind: str, is_final: bool, tmp_path: Path) -> None:
    script = (
        "import json, sys; print(json.dumps({'event': 'outcome', 'outcome': 'failed', "
        f"'error': {{'type': '{kind}', 'message': 'for a reason'}}}})); sys.exit(1)"
    )
    outcome, _, _, _ = run_script(tmp_path, script)
    assert outcome.is_final == is_final


def test_a_stop_lets_the_child_save_before_it_goes_on(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []

    def stop_at_progress(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "progress":
            raise Stopped

    command = ScriptCommand("segment", job(tmp_path), 20.0, SAVING_CHILD.format(save_s=0.5))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped):
            run_stage(command, stop_at_progress, lambda _line: None)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert events[-1] == {"event": "outcome", "outcome": "preempted", "step": 7}


def test_a_child_that_does_not_save_in_time_is_killed(tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        raise Stopped

    command = ScriptCommand("segment", job(tmp_path), 1.0, SAVING_CHILD.format(save_s=60))
    handler = signal.getsignal(signal.SIGTERM)
    before = set(psutil.Process().children(recursive=True))
    start_s = time.monotonic()
    try:
        with pytest.raises(Stopped):
            run_stage(command, stop, lambda _line: None)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert time.monotonic() - start_s < 20
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_child_saves_when_its_parent_is_killed(tmp_path: Path) -> None:
    marker = tmp_path / "saved"
    child = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(marker)!r}).touch(), "
        "sys.exit(75)))\n"
        "print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys\nfrom holdfast.training.preemption.deathwatch import watched\n"
        f"subprocess.run(watched([sys.executable, '-c', {child!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline_s = time.monotonic() + 20
    while not marker.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert marker.exists()


def test_later_stages_take_the_configuration_of_the_run(tmp_path: Path) -> None:
    assert "--resume" not in StageCommand("segment", job(tmp_path)).argv()
    assert "--resume" in StageCommand("evaluate", job(tmp_path)).argv()
