"""``holdfast exec``: a script is started again until it has completed, within the budgets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.paths import RunDirectory
from tests.flows.prefect_server import wait_until
from tests.training.own_loop.test_own_loop import SCRIPT


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "holdfast", "exec", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes(run: RunDirectory) -> list[str]:
    return [record.outcome for record in read_segments(run)]


@pytest.mark.slow
def test_a_script_that_was_preempted_is_started_again_where_the_machine_stays(
    tmp_path: Path,
) -> None:
    where = ("--store", "elsewhere", "--run-id", "two")
    process = start(tmp_path, *where, str(SCRIPT), "steps", "store", "8:SIGTERM")
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert out.startswith("done 40")
    assert "the script was preempted (signal); again" in errors
    assert "was not started by holdfast exec" not in errors
    assert outcomes(RunDirectory(tmp_path / "elsewhere/points/two")) == ["preempted", "completed"]


@pytest.mark.slow
def test_crashes_without_progress_end_it_with_the_signal_that_killed_it(tmp_path: Path) -> None:
    arguments = ("--max-crashes", "1", str(SCRIPT), "steps", "store", "1:SIGKILL")
    process = start(tmp_path, *arguments)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGKILL, errors
    assert errors.count("the script was killed by SIGKILL; again in 5 s") == 1
    assert outcomes(RunDirectory(tmp_path / "store/points/one")) == ["running", "running"]


@pytest.mark.slow
def test_ctrl_c_is_passed_on_and_nothing_is_started_again(tmp_path: Path) -> None:
    process = start(tmp_path, str(SCRIPT), "steps", "store", "10:SIGSTOP")
    run = RunDirectory(tmp_path / "store/points/one")
    wait_until((run.checkpoint(9) / "manifest.json").is_file, 200, "step 9")
    [record] = read_segments(run)
    process.send_signal(signal.SIGINT)
    os.kill(record.pid, signal.SIGCONT)
    process.communicate(timeout=200)
    assert process.returncode == 75
    assert outcomes(run) == ["preempted"]


@pytest.mark.slow
def test_a_notice_between_two_starts_ends_it_as_preempted(tmp_path: Path) -> None:
    process = start(tmp_path, str(SCRIPT), "steps", "store", "4:SIGKILL")
    assert process.stderr is not None
    while "again in 5 s" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert process.returncode == 75
    assert len(outcomes(RunDirectory(tmp_path / "store/points/one"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.py",), "there is no script missing.py; expected the path of a Python file"),
        (("python3", "train.py"), "leave python3 out: write holdfast exec train.py"),
        ((str(SCRIPT), "steps", "store", "--fault=no model"), "the script keeps no model"),
    ],
)
def test_bad_input_is_final_and_told_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    process = start(tmp_path, *arguments)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2
    assert message in errors
    assert len(errors.splitlines()) == 1
