"""A real training on machines that come and go: segments are started, told and killed in time."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from holdfast.training.checkpointing.policy import build_schedule
from holdfast.training.configuration.schema import CheckpointConfig
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.ledger import Ledger, ledger, lives
from holdfast.training.simulation.capacity import Capacity, Machine, Trace, TraceCapacity
from holdfast.training.simulation.costs import RunCosts, read_costs
from holdfast.training.simulation.simulator import online, simulate
from tests.warm_start import WarmProcess

EXPERIMENT = f"{Path(__file__).with_name('paced.py')}:Paced"
MAX_LIVES = 200


def paced_run(store: Path, run_id: str) -> RunDirectory:
    """Where a run of the replayed experiment lies."""
    return RunDirectory(store / experiment_name(EXPERIMENT) / run_id)


@dataclass(frozen=True)
class Always:
    """One machine that is there and stays."""

    def next_machine(self, at_s: float) -> Machine:
        """As ``Capacity``."""
        return Machine(at_s, math.inf)


@dataclass
class Replay:
    """A run on those machines; the next segment is started as soon as the one before has ended.

    Attributes:
        started_s: when each process was started, Unix seconds by pid.
        lived_s: how long all of them lived.
        finish_s: from the beginning to the end.
        num_told: processes that got a notice.
        num_vanished: those that were killed.
    """

    run: RunDirectory
    started_s: dict[int, float] = field(default_factory=dict)
    lived_s: float = 0.0
    finish_s: float = 0.0
    num_told: int = 0
    num_vanished: int = 0

    @property
    def spent(self) -> Ledger:
        """What the records say."""
        return ledger(read_segments(self.run))

    def costs(self, every_epochs: int) -> RunCosts:
        """By the records; a start begins with the process, and there is no pause beside it."""
        records = read_segments(self.run)
        starts = [
            life.begin_s + life.starting_s - self.started_s[record.pid]
            for record, life in zip(records, lives(records), strict=True)
        ]
        given = {"start_s": fmean(starts), "takeover_s": 0.0, "handover_s": 0.0}
        return read_costs(self.run, every_epochs, given)

    def play(self, capacity: Capacity, overrides: Sequence[str], grace_s: float) -> None:
        """Train until the run is completed."""
        arguments = ["segment", "--progress", "none", "--experiment", EXPERIMENT]
        arguments += ["--store", str(self.run.path.parent.parent), "--run-id", self.run.path.name]
        own = (*overrides, f"preemption.grace_period_s={grace_s}", "rehearsal.depth=none")
        arguments += [word for override in own for word in ("--set", override)]
        WarmProcess(["--help"], child_environment(1)).communicate(120.0)  # has imported torch now
        begun_s = time.monotonic()
        for _ in range(MAX_LIVES):
            machine = capacity.next_machine(time.monotonic() - begun_s)
            time.sleep(max(0.0, begun_s + machine.begin_s - time.monotonic()))
            at_s = time.monotonic()
            process = WarmProcess(arguments, child_environment(1))
            self.started_s[process.pid] = time.time()
            code = self._lived(process, machine, begun_s)
            self.lived_s += time.monotonic() - at_s
            errors = process.communicate(10.0)[1]
            # One that is told before it listens ends by that.
            assert code in (0, 75, -signal.SIGKILL, -signal.SIGTERM), f"{code}: {errors}"
            if code == 0:
                self.finish_s = time.monotonic() - begun_s
                return
        raise AssertionError(f"{MAX_LIVES} processes did not end the run")

    def _lived(self, process: WarmProcess, machine: Machine, begun_s: float) -> int:
        """Tell the process, and end it, when the machine's time has come. Its exit code."""
        told_s = begun_s + machine.end_s - machine.notice_s
        if machine.notice_s and _outlives(process, told_s):
            self.num_told += 1
            os.kill(process.pid, signal.SIGTERM)
        if _outlives(process, begun_s + machine.end_s):
            self.num_vanished += 1
            os.kill(process.pid, signal.SIGKILL)
        return process.wait(60.0)


def simulated(costs: RunCosts, trace: Trace, checkpoint: CheckpointConfig) -> Ledger:
    """What the simulator says of a replay."""
    rule = online(build_schedule(checkpoint), costs, checkpoint.mean_time_between_preemptions_s)
    found = simulate(costs, TraceCapacity(trace, 0.0), rule)
    assert found is not None, "it never ends"
    return found


def _outlives(process: WarmProcess, moment_s: float) -> bool:
    """Wait until then, or until the process has ended."""
    try:
        process.wait(max(0.0, min(moment_s - time.monotonic(), 3600.0)))
    except subprocess.TimeoutExpired:
        return True
    return False
