"""The process below ``holdfast run``: Prefect and the flow, apart from the terminal.

It reads the flow's parameters as JSON on stdin, and tells events on the file descriptor that
``HOLDFAST_EVENTS_FD`` names; the last one is ``result`` or ``error``. It runs in a session of its
own: Ctrl-C reaches the command line alone, which then stops this process in an orderly way.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from holdfast.training.preemption.deathwatch import EXIT_PREEMPTED


def main() -> int:
    """Run the flow; exit code 0, 75, 2 or 1."""
    parameters = json.load(sys.stdin)
    # The temporary server would tell its makers that it was started; it works without.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    # Prefect gives it 20 s, which a first start (migrations) on a busy machine may exceed.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")

    from prefect.exceptions import CancelledRun, TerminationSignal

    from holdfast.tasks.reporter import tell_terminal
    from holdfast.training.errors import HoldfastError

    try:
        result = _run_flow(parameters)
    except HoldfastError as error:
        tell_terminal({"event": "error", "message": str(error), "exit_code": error.exit_code})
        return error.exit_code
    except (TerminationSignal, CancelledRun, KeyboardInterrupt):
        return EXIT_PREEMPTED
    tell_terminal({"event": "result", "result": result})
    return 0


def _run_flow(parameters: dict[str, Any]) -> dict[str, Any]:
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        get_current_settings,
        temporary_settings,
    )

    from holdfast.flows.fleet.server import configured_api_url, require_server
    from holdfast.flows.pipeline.training_pipeline import training_pipeline
    from holdfast.tasks.preflight import require_prefect_home

    if configured_api_url() is not None:
        require_server()
        return dict(training_pipeline(**parameters))
    require_prefect_home(get_current_settings().home)
    # Nobody watches a temporary server for missing heartbeats, and the thread costs a second.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        return dict(training_pipeline(**parameters))


if __name__ == "__main__":
    sys.exit(main())
