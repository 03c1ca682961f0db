"""Which rank a process is, and where it meets the others: what the launcher tells it.

The standard library alone: a process looks for its seat before it imports torch.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import struct
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "HOLDFAST_RANK"
PR_SET_PDEATHSIG = 1
BEAT = struct.Struct("<Q")
OUTCOME = "outcome-{}.json"


@dataclass(frozen=True)
class Seat:
    """One rank's place in a training of several processes.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        host: the address of the store over which all meet.
        port: of that store.
        launcher_pid: the process that started the ranks of this machine.
        folder: the launcher's own, for what ranks tell it.
        timeout_s: how long to wait for the others.
        first_rank: of this machine; 0 on the one that the run was started on.
        num_here: how many ranks are on this machine.
    """

    rank: int
    size: int
    host: str
    port: int
    launcher_pid: int
    folder: str
    timeout_s: float
    first_rank: int
    num_here: int

    def environment(self) -> dict[str, str]:
        """The variable that gives a process this seat."""
        return {VARIABLE: json.dumps(asdict(self))}

    @property
    def outcome_file(self) -> Path:
        """Where the rank writes how it ended."""
        return Path(self.folder) / OUTCOME.format(self.rank)

    @property
    def is_guest(self) -> bool:
        """Whether this machine has joined a run that another one has started."""
        return self.first_rank > 0


_taken: Seat | None = None


def own_seat() -> Seat | None:
    """The seat of this process; None for one that trains alone, or is none of a training's."""
    text = os.environ.get(VARIABLE)
    return Seat(**json.loads(text)) if text else _taken


def take_seat() -> Seat | None:
    """As ``own_seat``. Processes that this one starts from here on are no ranks."""
    global _taken  # as the variable was: of this process
    _taken = own_seat()
    os.environ.pop(VARIABLE, None)
    return _taken


def end_with_launcher(seat: Seat) -> None:
    """Have the kernel kill this process when the launcher ends, or now if it has ended.

    Not by SIGTERM, which is a notice: a launcher that was killed is a whole training that was
    killed. Only Linux can do this; elsewhere nothing is done.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != seat.launcher_pid:
        os.kill(os.getpid(), signal.SIGKILL)


class Beats:
    """A counter in shared memory for each rank here: whoever does something new counts one up."""

    def __init__(self, folder: Path, size: int) -> None:
        """Made by whoever comes first; all counters begin at 0."""
        descriptor = os.open(folder / "beats", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, size * BEAT.size)
        self._size = size
        self._memory = mmap.mmap(descriptor, size * BEAT.size)
        os.close(descriptor)

    def beat(self, place_here: int) -> None:
        """Count up. Takes less than a microsecond."""
        place = place_here * BEAT.size
        BEAT.pack_into(self._memory, place, BEAT.unpack_from(self._memory, place)[0] + 1)

    def all(self) -> list[int]:
        """The counters of all ranks here, in their order."""
        return [BEAT.unpack_from(self._memory, place * BEAT.size)[0] for place in range(self._size)]
