"""What a draining worker and the engines below it tell each other. Standard library alone.

The worker tells its process id and how long its runs may save, in the environment; an engine that
learned that the machine goes away sends the worker SIGUSR1, so that it takes up nothing new here.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from holdfast.tasks.completion import GRACE_VARIABLE

WORKER_VARIABLE = "HOLDFAST_WORKER_PID"
DRAIN_SIGNAL = signal.SIGUSR1
# From the end of a save to the end of the engine: setting the state, sending the last logs.
HANDOVER_MARGIN_S = 4.0


def engine_environment(drain_s: float) -> dict[str, str]:
    """Variables for an engine below a worker that drains for ``drain_s``."""
    grace_s = max(1.0, drain_s - HANDOVER_MARGIN_S)
    return {WORKER_VARIABLE: str(os.getpid()), GRACE_VARIABLE: f"{grace_s:g}"}


def tell_worker_to_drain() -> None:
    """Ask the worker that started this engine to drain; nothing happens where there is none."""
    pid = os.environ.get(WORKER_VARIABLE)
    if pid is None or int(pid) != os.getppid():
        return  # another kind of worker, or ours is gone and the number may be another's
    with suppress(ProcessLookupError, PermissionError):
        os.kill(int(pid), DRAIN_SIGNAL)
