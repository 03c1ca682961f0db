"""Hand a flow run over to another worker: same id, another process, another machine.

Measured with Prefect 3.8: setting the state through the client and then raising ``Abort`` works.
Returning ``AwaitingRetry()`` ends as Crashed, proposing it and returning is overwritten with
Completed, proposing it and exiting with 1 is overwritten with Crashed.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.runtime import flow_run
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)
from prefect.states import AwaitingRetry

logger = logging.getLogger(__name__)

# A worker with a limit crashes in Prefect 3.8 if a run of it comes back before its slot is free.
DELAY_S = 3.0
SIGTERM_BEHAVIOR_VARIABLE = "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"
# Few and short: what is left of a grace period is what the machine has left.
API_TIMEOUT_S = 3.0
API_RETRIES = 1


@dataclass(frozen=True)
class FlowRunAttempt:
    """Which start of which flow run this process is.

    Attributes:
        run_count: how often the flow run had been started when it was read.
    """

    flow_run_id: UUID
    run_count: int


def current_attempt() -> FlowRunAttempt:
    """The attempt that this process is, as the server counts it."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(flow_run.id))
    return FlowRunAttempt(found.id, found.run_count)


def is_ours_to_hand_over() -> bool:
    """False under ``prefect flow-run execute`` that was told to see to it itself."""
    return os.environ.get(SIGTERM_BEHAVIOR_VARIABLE, "").lower() not in ("reschedule", "relinquish")


def hand_over(attempt: FlowRunAttempt, reason: str, delay_s: float = DELAY_S) -> bool:
    """Have the flow run started again in ``delay_s``, by whichever worker is there.

    Returns False, and changes nothing, where the flow run is no longer ours (it was cancelled, or
    another worker has it) or the server does not answer.
    """
    settings = {
        PREFECT_API_REQUEST_TIMEOUT: API_TIMEOUT_S,
        PREFECT_CLIENT_MAX_RETRIES: API_RETRIES,
    }
    try:
        with temporary_settings(settings), get_client(sync_client=True) as client:
            if not is_running_as(attempt, client.read_flow_run(attempt.flow_run_id)):
                return False
            scheduled = datetime.now(UTC) + timedelta(seconds=delay_s)
            message = f"handed over: {reason}"
            state: State[None] = AwaitingRetry(scheduled_time=scheduled, message=message)
            client.set_flow_run_state(attempt.flow_run_id, state)
    except Exception as error:  # noqa: BLE001 - httpx's and Prefect's; the caller goes another way
        logger.warning("the flow run could not be handed over: %s: %s", type(error).__name__, error)
        return False
    return True


def is_running_as(attempt: FlowRunAttempt, found: FlowRun) -> bool:
    """Whether a flow run is still running in the very attempt that we are."""
    is_running = found.state is not None and found.state.type is StateType.RUNNING
    return is_running and found.run_count == attempt.run_count
