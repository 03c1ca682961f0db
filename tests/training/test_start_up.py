"""Notices that come while a stage starts, long before it can save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.campaign import Training


def is_held(pid: int) -> bool:
    """Whether a process holds SIGTERM back."""
    status = Path(f"/proc/{pid}/status").read_text()
    [blocked] = [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")]
    return bool(int(blocked, 16) >> (signal.SIGTERM - 1) & 1)


def wait_until_held(pid: int) -> None:
    while not is_held(pid):
        time.sleep(0.001)


def test_a_notice_in_the_first_moment_is_answered_also_across_the_new_start(
    tmp_path: Path,
) -> None:
    # An environment that is not right makes the program start anew.
    segment = Training(tmp_path, "early", is_cold=True).start({"OMP_DYNAMIC": "TRUE"})
    wait_until_held(segment.process.pid)
    segment.kill(signal.SIGTERM)
    assert segment.finish() == 75
    assert segment.events[-1]["outcome"] == "preempted"


def test_signals_are_held_before_anything_slow_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "holdfast.training", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    before = imported[: imported.index("holdfast.training.preemption.signals")]
    assert "click" in imported
    assert not {"click", "pydantic", "multiprocessing"} & set(before)


def test_what_is_no_stage_ends_at_ctrl_c_as_any_program_does(tmp_path: Path) -> None:
    code = (
        "import runpy, sys, holdfast.training.checkpointing.inspection as inspection\n"
        "sys.argv = ['training', 'checkpoints', 'list', sys.argv[1]]\n"
        "def wait(place): print('waiting', flush=True); __import__('time').sleep(60)\n"
        "inspection.find_checkpoints = wait\n"
        "runpy.run_module('training', run_name='__main__')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
