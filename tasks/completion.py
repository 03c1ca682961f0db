"""Run a stage again and again until it completes, within two budgets.

Preemptions are normal: any number, as long as there is progress. Crashes are not: a small number
without progress between them, with growing pauses. Both are counted from the run directory.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import partial
from typing import Protocol

from holdfast.tasks.attempts import AttemptLog, crashes_in_a_row, idle_preemptions_in_a_row
from holdfast.tasks.child import Event, Stage, StageCommand, StageOutcome, run_stage
from holdfast.tasks.engine_lease import read_engine, require_engine_is_here
from holdfast.tasks.job import Job
from holdfast.tasks.limits import Limits
from holdfast.tasks.stage_errors import stage_error
from holdfast.training.errors import HoldfastError, LeaseHeldError, StorageError
from holdfast.training.preemption.deathwatch import EXIT_PREEMPTED
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.runs.lease import read_lease

GRACE_VARIABLE = "HOLDFAST_GRACE_PERIOD_S"
LEASE_ERRORS = ("LeaseHeldError", "LeaseLostError")
MACHINE_LOST = "MachineLostError"
STAYS = ("signal", "other_machine")
"""Sources of a notice after which this machine trains on: somebody stopped it, or one of several
machines goes away."""
# After a grace period and a lease's end, whoever still writes is alive and will not stop.
PATIENCE_S = 60.0
LOOK_EVERY_S = 0.5


class MachineLeavingError(HoldfastError):
    """A notice says that this machine goes away; the stage has saved and stopped.

    Attributes:
        source: who said so.
    """

    exit_code = EXIT_PREEMPTED

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"this machine goes away ({source}: {reason}); the run is saved")
        self.source = source

    @property
    def is_for_good(self) -> bool:
        """Whether nothing should be started here any more; a wall-time budget is one run's own."""
        return self.source != "wall_time"


class Listener(Protocol):
    """Whom a stage's events and log lines are told; ``holdfast.tasks.reporter.Reporter`` is one."""

    def event(self, event: Event) -> None:
        """One event of a stage."""
        ...

    def log(self, line: str) -> None:
        """One line of its log."""
        ...

    def warn(self, message: str) -> None:
        """What a person should know."""
        ...


def complete_stage(stage: Stage, job: Job, limits: Limits, listener: Listener) -> StageOutcome:
    """Run a stage until it completes. To be called in the main thread. Returns how it did.

    Raises:
        StageInputError: the stage refused its input.
        StageFailedError: it failed for good: why, the end of its log, how to see it again.
        MachineLeavingError: it was preempted by a notice that this machine goes away.
        LeaseHeldError: another process writes the run and does not stop.
        LeaseLostError: another engine has taken the run over.
    """
    command = StageCommand(stage, job, grace_period_s(limits))
    engine = read_engine(job.run)
    log = AttemptLog(job.run, stage, engine[1].flow_run_id if engine else "")
    listener.event({"event": "stage", "stage": stage, "state": "started"})
    while True:
        wait_for_writer(job.run, command.grace_period_s + PATIENCE_S, listener)
        outcome = _attempt(command, log, listener)
        if outcome.outcome == "completed":
            break
        require_engine_is_here(job.run)
        pause_s = _pause_s(command, outcome, log, limits)
        if outcome.outcome == "failed":
            how = "goes on with fewer" if _is_machine_lost(outcome) else "crashed"
            listener.warn(f"{stage} {how} ({outcome.explain()}); again in {pause_s:.0f} s")
        time.sleep(pause_s)
    listener.event({"event": "stage", "stage": stage, "state": "finished"})
    return outcome


def grace_period_s(limits: Limits) -> float:
    """What a child gets to save: what was asked for, or less where the worker grants less."""
    granted = os.environ.get(GRACE_VARIABLE)
    return min(limits.grace_period_s, float(granted)) if granted else limits.grace_period_s


def wait_for_writer(run: RunDirectory, patience_s: float, listener: Listener) -> None:
    """Wait while another process writes the run: the child of a lost engine that still saves.

    Raises LeaseHeldError where it does not stop within ``patience_s``.
    """
    deadline_s = time.monotonic() + patience_s
    is_told = False
    while (held := read_lease(run)) is not None and not held.is_expired:
        if time.monotonic() > deadline_s:
            raise LeaseHeldError(held.refusal(run))
        if not is_told:
            listener.log(f"waiting for {held.holder}, which still writes {run.path}")
            is_told = True
        time.sleep(LOOK_EVERY_S)


def _attempt(command: StageCommand, log: AttemptLog, listener: Listener) -> StageOutcome:
    """One attempt, noted in the run if there is a run, or if one could have begun."""
    is_begun = command.job.run.run_json.exists()
    if is_begun:
        log.begin()
    try:
        outcome = run_stage(command, partial(_tell, listener, command.stage), listener.log)
    except BaseException:
        with suppress(StorageError):  # what stopped us matters more
            if is_begun:
                log.end("preempted", None)
        raise
    if not is_begun and not outcome.is_final:
        log.begin()
    if is_begun or not outcome.is_final:
        is_no_fault = _is_about_lease(outcome) or _is_machine_lost(outcome)
        ending = "preempted" if is_no_fault else outcome.outcome
        log.end(ending, outcome.exit_code, outcome.explain() if outcome.error else None)
    return outcome


def _is_about_lease(outcome: StageOutcome) -> bool:
    """Whether another writer was there: no fault of the stage."""
    return outcome.error is not None and outcome.error.get("type") in LEASE_ERRORS


def _is_machine_lost(outcome: StageOutcome) -> bool:
    """Whether another machine went away without a notice: as normal as that this one does."""
    return outcome.error is not None and outcome.error.get("type") == MACHINE_LOST


def _tell(listener: Listener, stage: Stage, event: Event) -> None:
    listener.event({"stage": stage, **event})


def _pause_s(
    command: StageCommand, outcome: StageOutcome, log: AttemptLog, limits: Limits
) -> float:
    """Seconds until the next attempt; raises where there is to be none."""
    if outcome.is_final:
        raise stage_error(command, outcome)
    if _is_about_lease(outcome):
        return LOOK_EVERY_S  # the next round waits for the writer
    attempts = log.read()
    num_crashes = crashes_in_a_row(attempts)
    is_idle = idle_preemptions_in_a_row(attempts) > limits.max_idle_preemptions
    if num_crashes > limits.max_crashes or is_idle:
        raise stage_error(command, outcome)
    if _is_machine_lost(outcome):
        return 0.0
    if outcome.outcome == "failed":
        return float(limits.crash_backoff_s * 2 ** max(0, num_crashes - 1))
    notice = outcome.notice or {}
    if notice.get("source", "signal") not in STAYS:
        raise MachineLeavingError(str(notice["source"]), str(notice.get("reason", "")))
    return 0.0
