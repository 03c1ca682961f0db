"""Become another command that ends with its parent.

``python -m holdfast.training.preemption.deathwatch PARENT_PID COMMAND...``

The kernel is asked to send SIGTERM when the thread that started this process ends
(``PR_SET_PDEATHSIG``); that survives ``exec``. It is asked here, in the new process, and not in a
``preexec_fn``, which is unsafe below a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from holdfast.training.exactness.reproducibility import python_command

EXIT_PREEMPTED = 75
PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have this process get SIGTERM when its parent dies; end at once if that has happened.

    Only Linux can do this; elsewhere nothing is done.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        sys.exit(EXIT_PREEMPTED)


def watched(argv: list[str]) -> list[str]:
    """The command line that runs ``argv`` as a child that does not outlive this process."""
    return python_command("holdfast.training.preemption.deathwatch", str(os.getpid()), *argv)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
