"""One process that hangs: where it stands is told, and it is killed, whatever holds it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.training.distributed.seat import Beats
from holdfast.training.distributed.watchdog import Silence
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.runs.directory import ledger_outcome, read_segments
from tests.faults.campaign import Training
from tests.training.runs.test_segment_log import lines_of

UNREHEARSED = "rehearsal.depth=none"
EXPERIMENT = f"{Path(__file__).parents[1] / 'spikes' / 'spiking.py'}:Spiking"


@pytest.mark.parametrize("holds_interpreter", [False, True])
def test_a_process_that_hangs_is_killed_and_the_run_goes_on(
    tmp_path: Path, holds_interpreter: bool
) -> None:
    hangs = ("experiment.hangs_at=20", f"experiment.holds_interpreter={holds_interpreter}".lower())
    training = Training(tmp_path, "one", EXPERIMENT, (*hangs, "train.hang_timeout_s=1.5"))
    environment = {"CALLS": str(tmp_path / "calls")}
    segment = training.start(environment)
    assert segment.finish() == -signal.SIGKILL
    told = "".join(segment.errors)
    assert "train.hang_timeout_s=1.5 allows: it is killed" in told
    assert "in hang" in told  # the stacks name the function
    path = training.run.logs / "segment-0001.log"
    assert "in hang" in "".join(lines_of(path, "it is killed"))
    [record] = read_segments(training.run)
    assert ledger_outcome(record, is_alive=False) == "killed"
    assert sorted(int(line) for line in (tmp_path / "calls").read_text().split()) == [*range(1, 21)]


@pytest.mark.slow
def test_a_process_that_hangs_before_its_first_step_is_killed(tmp_path: Path) -> None:
    words = ["segment", "--experiment", EXPERIMENT, "--store", str(tmp_path), "--run-id", "one"]
    overrides = ("experiment.hangs_in_dataset=true", "train.hang_timeout_s=1", UNREHEARSED)
    words += [word for override in overrides for word in ("--set", override)]
    script = (
        "from holdfast.training.distributed import watchdog; watchdog.STARTING_S = 2.0; "
        "from holdfast.training.command_line import main; main()"
    )
    command = [sys.executable, "-P", "-c", script, *words]
    environment = child_environment(1)  # else it would start anew, without what is patched
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert "more than it may take until its first step is done: it is killed" in done.stderr
    assert "in hang" in done.stderr


def test_a_process_that_works_is_left_alone(tmp_path: Path) -> None:
    training = Training(tmp_path, "one", EXPERIMENT, ("train.hang_timeout_s=60",))
    segment = training.start({"CALLS": str(tmp_path / "calls")})
    assert segment.finish() == 0, "".join(segment.errors)


def test_silence_is_longer_while_a_process_starts(tmp_path: Path) -> None:
    beats = Beats(tmp_path, 2)
    silence = Silence(beats, 0.05, num_beats_of_start=1)
    beats.beat(0)
    assert silence.too_long_s() is None
    time.sleep(0.1)
    assert silence.too_long_s() is None  # the other one has not begun
    beats.beat(1)
    assert silence.too_long_s() is None
    time.sleep(0.1)
    found = silence.too_long_s()
    assert found is not None
    assert found > 0.05
    beats.beat(1)
    assert silence.too_long_s() is None
