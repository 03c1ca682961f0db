"""The rehearsal as a process: bounded, ended by a notice, and without a trace in the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.rehearsal.asking import Asked, rehearse
from holdfast.training.rehearsal.findings import Finding, Report, error_of
from holdfast.training.rehearsal.request import DEPTH_VARIABLE, Depth, resolved_depth
from tests.faults.campaign import HARD, Segment, Training, complete, differences, final_state

HERE = Path(__file__).with_name("rehearsed_experiments.py")
STEP = "rehearsal.depth=step"


def asked(name: str, store: Path, *overrides: str, depth: Depth = "step") -> Asked:
    return Asked(f"{HERE}:{name}", store, 1, overrides=overrides, depth=depth)


def training(name: str, store: Path, *overrides: str) -> Training:
    return Training(store, "one", f"{HERE}:{name}", (STEP, *overrides))


def rehearsing_children() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "holdfast.training.rehearsal.acting" in " ".join(process.cmdline())
    ]


def test_a_fit_experiment_is_rehearsed_and_nothing_is_left(tmp_path: Path) -> None:
    acts: list[str] = []
    report = rehearse(asked("Filled", tmp_path), on_act=lambda act, *_: acts.append(act))
    assert report is not None
    assert (report.findings, report.left_out) == ((), ())
    assert acts == list(report.acts)
    assert report.cost["checkpoint_bytes"] > 1000
    assert (report.cost["num_full"], report.cost["num_weights"]) == (2, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    report = rehearse(asked("Slow", tmp_path, "rehearsal.max_s=25"))
    assert report is not None
    [finding] = report.findings
    assert (finding.severity, finding.act) == ("note", "validation")
    assert "rehearsal.max_s was over" in finding.message
    assert report.left_out[0] == "validation"
    assert error_of(report, is_strict=True) is None


def test_a_process_that_dies_says_in_which_act(tmp_path: Path) -> None:
    report = rehearse(asked("Dying", tmp_path))
    assert report is not None
    [finding] = report.findings
    assert (finding.severity, finding.act, finding.may_pass) == ("error", "two steps", True)
    assert "ended by SIGKILL; often the machine is short of memory" in finding.message
    error = error_of(report, is_strict=False)
    assert error is not None
    assert error.exit_code == 1


def test_it_can_be_stopped_at_once(tmp_path: Path) -> None:
    seen: list[str] = []
    start_s = time.monotonic()
    stopped = rehearse(
        asked("Slow", tmp_path), lambda: "validation" in seen, lambda act, *_: seen.append(act)
    )
    assert stopped is None
    assert time.monotonic() - start_s < 50
    assert rehearsing_children() == []


def test_warnings_are_errors_where_strictness_is_asked_for() -> None:
    warning, note = (Finding(severity, "act", severity) for severity in ("warning", "note"))
    report = Report((note, warning))
    assert error_of(report, is_strict=False) is None
    error = error_of(report, is_strict=True)
    assert error is not None
    assert (str(error), error.exit_code) == ("warning", 2)
    passing = Finding("error", "act", "no answer", may_pass=True)
    error = error_of(Report((passing,)), is_strict=False)
    assert error is not None
    assert error.exit_code == 1


def test_the_depth_comes_from_the_configuration_then_from_the_environment() -> None:
    assert resolved_depth(None, {}) == "export"
    assert resolved_depth(None, {DEPTH_VARIABLE: "none"}) == "none"
    assert resolved_depth("step", {DEPTH_VARIABLE: "none"}) == "step"
    with pytest.raises(ValueError, match=r"HOLDFAST_REHEARSAL_DEPTH = 'deep'.*allowed: none, step"):
        resolved_depth(None, {DEPTH_VARIABLE: "deep"})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("HoldsASet", (), "error: experiment/seen is a set"),
        ("Counter", ("--strict",), "error: a run that is resumed would end with other bytes"),
    ],
)
def test_a_run_that_is_not_fit_is_not_begun(
    name: str, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    segment = training(name, tmp_path).start(arguments=arguments)
    assert segment.finish() == 2
    assert segment.errors[-1].startswith(message)
    assert list(tmp_path.iterdir()) == []
    assert segment.events[-1]["outcome"] == "failed"


def test_a_warning_is_told_and_training_goes_on(tmp_path: Path) -> None:
    segment = complete(training("Counter", tmp_path))
    [warning] = [event for event in segment.events if event["event"] == "log"
                 and event["level"] == "warning"]  # fmt: skip
    assert "experiment.num_calls" in str(warning["message"])


def wait_for_act(segment: Segment, act: str) -> None:
    while (event := segment.wait_for("rehearsing")) is not None and event["message"] != act:
        pass


def test_a_notice_ends_it_at_once_and_the_run_is_not_begun(tmp_path: Path) -> None:
    segment = training("Slow", tmp_path).start()
    wait_for_act(segment, "validation")
    start_s = time.monotonic()
    segment.kill(signal.SIGTERM)
    assert segment.finish() == 75
    assert time.monotonic() - start_s < 20
    assert segment.events[-1]["outcome"] == "preempted"
    assert list(tmp_path.iterdir()) == []


def test_it_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    segment = training("Slow", tmp_path).start()
    wait_for_act(segment, "validation")
    [child] = [
        process
        for process in psutil.Process(segment.process.pid).children(recursive=True)
        if "holdfast.training.rehearsal.acting" in " ".join(process.cmdline())
    ]
    segment.kill(signal.SIGKILL)
    segment.finish()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running()


def test_a_rehearsal_changes_no_byte_and_is_not_repeated(tmp_path: Path) -> None:
    short = ("train.max_steps=9", "logging.every_s=0.0001")
    states = []
    for depth in ("none", "step"):
        run = Training(tmp_path / depth, "one", HARD, (*short, f"rehearsal.depth={depth}"))
        segment = complete(run)
        has_rehearsed = any(event["event"] == "rehearsal" for event in segment.events)
        assert has_rehearsed == (depth == "step")
        # Programs read the step of each.
        assert all("step" in event for event in segment.events if event["event"] == "progress")
        states.append(final_state(run.run))
    assert differences(*states) == []
    again = complete(run)
    assert not any(event["event"] == "rehearsal" for event in again.events)


def check(*arguments: str, store: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "holdfast", "check", *arguments, "--store", str(store)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(1),
    )


def test_the_command_says_whether_an_experiment_is_fit(tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = check(f"{HERE}:Counter", "--depth", "step", store=store)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("warning: save and restore: a run that is resumed")
    assert lines[-1].startswith(f"{HERE}:Counter is fit to be trained: 10 acts in ")
    strict = check(f"{HERE}:Counter", "--depth", "step", "--strict", "--json", store=store)
    assert strict.returncode == 2
    told: dict[str, Any] = json.loads(strict.stdout)
    assert told["is_fit"] is False
    assert told["findings"][0]["severity"] == "warning"
    assert not store.exists()


def test_ctrl_c_ends_the_command_and_what_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "holdfast", "check", f"{HERE}:Slow"]
    process = subprocess.Popen(
        [*command, "--store", str(tmp_path)], env=child_environment(1), stderr=subprocess.PIPE
    )
    deadline_s = time.monotonic() + 60
    while not rehearsing_children() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    [child] = rehearsing_children()
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == b"stopped"
    assert not child.is_running()
