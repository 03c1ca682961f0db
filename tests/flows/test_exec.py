"""``holdfast exec``: a script is started again until it has completed, within the budgets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.training.runs.directory import read_run_record, read_segments, run_identity
from holdfast.training.runs.losses import compare_losses
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_before_the_script_has_a_run_ends_it_as_preempted(
    tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "slow_start.py"
    script.write_text("import time\n\nprint('up', flush=True)\ntime.sleep(200)\n")
    process = start(tmp_path, str(script))
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    process.communicate(timeout=200)
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stor", "x", "train.py"), "--stor is no option of holdfast exec: options come before"),
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


PROGRAMS = {
    "unreadable.py": (
        "import sys\n\nfor x in range(3)\n    pass\n",
        "unreadable.py:3: for x in ra",
    ),
    "unimportable.py": ("import sys\nimport nowhere_at_all\n", "unimportable.py:2 in <module>)"),
    "below.py": ("import beside\n", "beside.py:2 in <module>)"),
    "stranger.py": ("print('hello')\n", "stranger.py has ended, and never called holdfast.run"),
    "-m": ("", "ImportError: No module named nowhere_at_all"),
}


@pytest.mark.parametrize(
    "name",
    [
        "unreadable.py",
        "stranger.py",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("unimportable.py", "below.py", "-m")
        ),
    ],
)
def test_what_every_start_would_end_with_is_told_once(tmp_path: Path, name: str) -> None:
    content, message = PROGRAMS[name]
    (tmp_path / "beside.py").write_text("\nimport nowhere_at_all\n")
    (tmp_path / name).write_text(content)
    process = start(tmp_path, *(("-m", "nowhere_at_all") if name == "-m" else (name, "--lr=0.1")))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    assert message in errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("ends early", 2, "the script ended after step 10, and its loop had not"),
        ("no step", 2, "the script called holdfast.run and took no step from it"),
        ("wrong name", 1, "NameError: name 'lossy' is not defined ("),
    ],
)
def test_a_script_that_would_end_so_again_is_not_started_again(
    tmp_path: Path, fault: str, code: int, message: str
) -> None:
    process = start(tmp_path, str(SCRIPT), "steps", "store", f"--fault={fault}")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == code, errors
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "again in" not in errors


@pytest.mark.slow
def test_a_script_that_says_that_it_failed_is_started_again(tmp_path: Path) -> None:
    arguments = ("--max-crashes", "1", str(SCRIPT), "steps", "store", "--fault=leaves with 3")
    process = start(tmp_path, *arguments)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 3, errors
    assert errors.count("the script ended with exit code 3; again in 5 s") == 1
    assert "error: " not in errors
    assert outcomes(RunDirectory(tmp_path / "store/points/one"))[0] == "failed"


@pytest.mark.slow
def test_another_configuration_is_taken_over_where_that_is_allowed(tmp_path: Path) -> None:
    once = ("--max-crashes", "0", str(SCRIPT), "steps", "store")
    start(tmp_path, *once, "16:SIGKILL").communicate(timeout=200)
    run = RunDirectory(tmp_path / "store/points/one")
    before = read_run_record(run)
    changed = ("--allow-mismatch", *once, "--rate=0.02")
    strict = start(tmp_path, "--strict", *changed)
    assert (
        strict.communicate(timeout=200)[1].rstrip().splitlines()[-1].startswith("error: going on")
    )
    assert read_run_record(run) == before
    process = start(tmp_path, *changed)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "experiment.rate: 0.01 there, 0.02 here" in errors
    record = read_run_record(run)
    assert record.config["experiment"] == {"rate": 0.02}
    assert record.config_digests == {before.config_digest, record.config_digest}
    [taken] = record.taken_over
    assert (taken.step, taken.changed) == (
        read_segments(run)[-1].start_step,
        {"experiment.rate": 0.01},
    )
    assert run_identity(record) == run_identity(before)
    assert compare_losses(run).num_different == 0  # those of other rates are not compared
    assert start(tmp_path, *once, "--rate=0.02").communicate(timeout=200)[1].count("error: ") == 0
    refused = start(tmp_path, *once)
    assert "experiment.rate: 0.02 there, 0.01 here" in refused.communicate(timeout=200)[1]
    assert refused.returncode == 2
