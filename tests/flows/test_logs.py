"""``holdfast logs``: what a run's segments said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.flows.command_line.group import exit_code_of
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.runs.segment_log import log_path
from tests.faults.campaign import HARD, Training, complete


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Two segments."""
    found = Training(tmp_path_factory.mktemp("store"), "one", HARD, ("train.max_steps=12",))
    segment = found.start({"HOLDFAST_FAULT_POINT": "save.after-snapshot:1"})
    assert segment.finish() == -9
    complete(found)
    return found


def test_the_newest_or_a_named_segment_is_shown(
    training: Training, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    store = str(training.store)
    assert exit_code_of(["logs", "one", "--store", store]) == 0
    newest = capfdbinary.readouterr().out
    assert newest == log_path(training.run.logs, 2).read_bytes()
    assert b"outcome=completed" in newest
    assert exit_code_of(["logs", "one", "--store", store, "--segment", "1"]) == 0
    assert b"outcome" not in capfdbinary.readouterr().out
    assert exit_code_of(["logs", "one", "--store", store, "--segment", "7"]) == 2
    assert b"no log of segment 7; there are logs of segments [1, 2]" in capfdbinary.readouterr().err


def test_a_run_is_followed_to_its_end(training: Training) -> None:
    followed = Training(training.store, "two", HARD, ("train.max_steps=12",))
    segment = followed.start()
    assert segment.wait_for("started") is not None
    command = [sys.executable, "-P", "-m", "holdfast", "logs", "two", "-f"]
    done = subprocess.run(
        [*command, "--store", str(training.store)],
        env=child_environment(1),
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert segment.finish() == 0
    path = log_path(followed.run.logs, 1)
    assert done.stdout == path.read_bytes()
    assert Path(path).stat().st_size > 0
