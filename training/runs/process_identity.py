"""Which process this is, and whether another one still lives.

A process id alone says little: ids are used again, and a container counts its own. A process is
known by its machine's boot, its pid namespace, its id and the time at which it started.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

HOST_VARIABLE = "HOLDFAST_HOST"
GONE_STATES = ("Z", "X", "x")  # a zombie runs no instruction any more, only its parent sees it
PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told apart from every other one of the world.

    Attributes:
        host: name of the machine, for people.
        boot_id: random id of the machine's boot; empty where the system has none.
        pid_namespace: what its process ids count within; empty where the system has none.
        pid: process id within that namespace.
        pid_start: clock ticks from the boot to the start of the process; 0 where unknown.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_start: int


def current_process(environment: Mapping[str, str] | None = None) -> ProcessIdentity:
    """The identity of this process.

    The variable HOLDFAST_HOST names the machine instead of what the system says. Two processes
    with different names take each other for processes of different machines; tests use it.
    """
    named = (os.environ if environment is None else environment).get(HOST_VARIABLE, "")
    state = _state_and_start(os.getpid())
    return ProcessIdentity(
        host=named or socket.gethostname(),
        boot_id=f"named:{named}" if named else _boot_id(PROC),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        pid_start=state[1] if state else 0,
    )


def presence(
    process: ProcessIdentity, here: ProcessIdentity
) -> Literal["alive", "gone", "unknown"]:
    """Whether ``process`` still runs, as far as ``here`` can see.

    ``unknown`` for another machine, another boot of it, or another pid namespace.
    """
    is_visible = (
        process.boot_id != ""
        and process.pid_namespace != ""
        and process.boot_id == here.boot_id
        and process.pid_namespace == here.pid_namespace
    )
    if not is_visible:
        return "unknown"
    if not _has_pid(process.pid):
        return "gone"
    found = _state_and_start(process.pid)
    if found is None or process.pid_start == 0:
        # /proc may be hidden from other users; the id exists, so it may well be the process.
        return "alive" if _has_pid(process.pid) else "gone"
    state, start = found
    return "gone" if state in GONE_STATES or start != process.pid_start else "alive"


def _has_pid(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """State letter and start time of ``/proc/<pid>/stat``; None where it cannot be read."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in brackets and may hold blanks and brackets itself.
    fields = text.rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else None


@cache  # a list of a thousand runs asks for it a thousand times
def _boot_id(proc: Path) -> str:
    try:
        return (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str((PROC / "self/ns/pid").readlink())
    except OSError:
        return ""
