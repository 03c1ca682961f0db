"""One start of a flow run by Prefect, from the engine's lease to the hand-over.

A flow run that a deployment started can go on elsewhere. Inside ``attempt`` this process is the
one engine of the run; when it is told to stop, it saves, asks Prefect to start the flow run again
on another worker, and leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.exceptions import Abort, TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run

from holdfast.flows.fleet.worker_link import tell_worker_to_drain
from holdfast.flows.pipeline.handover import (
    FlowRunAttempt,
    current_attempt,
    hand_over,
    is_ours_to_hand_over,
)
from holdfast.tasks.child import ignore_sigterm
from holdfast.tasks.completion import MachineLeavingError
from holdfast.tasks.engine_lease import (
    ENGINE_TTL_S,
    engine_lease,
    read_engine,
    require_engine_is_here,
)
from holdfast.tasks.job import Job
from holdfast.training.errors import LeaseHeldError, LeaseLostError
from holdfast.training.tiers.keeping import kept_up, opened_replica
from holdfast.training.tiers.viewing import viewed

# Time enough for the lease of an engine that vanished to run out.
ACQUIRE_WAIT_S = ENGINE_TTL_S + 5.0
BUSY_DELAY_S = 30.0

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]


@contextmanager
def attempt(job: Job) -> Iterator[None]:
    """Be the one engine of a run while the block runs, and hand the flow run over at a stop.

    Raises:
        Abort: the flow run was handed over, or another engine has taken it over; Prefect ends this
            process without touching the flow run's state.
        TerminationSignal: there is nobody to hand over to, or Prefect does it itself.
        LeaseHeldError: another flow run, or ``holdfast run``, works on this run.
    """
    logger = get_run_logger()
    ours = current_attempt() if deployment.id else None
    flow_run_id, run_count = (ours.flow_run_id, ours.run_count) if ours else (flow_run.id or "", 0)
    try:
        with (
            opened_replica(
                job.run, wait_s=_wait_s(ours), can_begin_early=True, tell=logger.warning
            ) as replica,
            engine_lease(job.run, str(flow_run_id), run_count, wait_s=_wait_s(ours)),
        ):
            with _handed_over_at_a_stop(ours, logger), kept_up(replica):
                yield
            require_engine_is_here(job.run)
    except LeaseLostError as error:
        logger.warning("%s", error)
        raise Abort(str(error)) from error
    except LeaseHeldError as error:
        if ours is None or not _is_same_flow_run(job, ours):
            raise
        # An earlier engine of this flow run was presumed dead and is not: it goes on.
        hand_over(ours, f"an earlier engine of this flow run still works: {error}", BUSY_DELAY_S)
        raise Abort(str(error)) from error


@contextmanager
def _handed_over_at_a_stop(ours: FlowRunAttempt | None, logger: Logger) -> Iterator[None]:
    try:
        yield
    except (TerminationSignal, MachineLeavingError) as stop:
        ignore_sigterm()
        # Prefect that was told to reschedule does so at a signal; it knows of no other notice.
        is_seen_to = isinstance(stop, TerminationSignal) and not is_ours_to_hand_over()
        if ours is None or is_seen_to:
            raise
        reason = str(stop) if isinstance(stop, MachineLeavingError) else "stopped by SIGTERM; saved"
        if not hand_over(ours, reason):
            raise
        logger.warning("handed over to another worker: %s", reason)
        if isinstance(stop, MachineLeavingError) and stop.is_for_good:
            tell_worker_to_drain()
        raise Abort(f"handed over: {reason}") from stop


def _wait_s(ours: FlowRunAttempt | None) -> float:
    """A person at a terminal is told at once; a flow run waits for its predecessor's end."""
    return ACQUIRE_WAIT_S if ours else 0.0


def _is_same_flow_run(job: Job, ours: FlowRunAttempt) -> bool:
    engine = read_engine(viewed(job.run))
    return engine is not None and engine[1].flow_run_id == str(ours.flow_run_id)
