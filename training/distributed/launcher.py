"""Starts the ranks of a training on this machine, and ends them all when one is lost.

The launcher does no work of its own: it holds the store over which ranks meet, passes signals on,
reads what they say, and watches whether anything new happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from torch._C._distributed_c10d import TCPStore

from holdfast.training.distributed.seat import Beats, Seat
from holdfast.training.distributed.watchdog import STACKS_S, STARTING_S, Silence, ask_for_stacks
from holdfast.training.distributed.world import ERROR, HOST, NEWCOMER
from holdfast.training.errors import StorageError
from holdfast.training.preemption.signals import (
    ReceivedSignal,
    current_signal_flag,
    signals_held,
)
from holdfast.training.runs.progress import write_line

POLL_S = 0.02
END_S = 10.0
"""How long ranks may take to end by themselves once one has failed: they learn of it within a
second, and rank 0 lets the save in flight end."""
NUM_BEATS_OF_START = 3  # when it has met the others, and around its first step
NUM_TAIL_LINES = 400
GOOD_CODES = (0, 75)
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended.

    Attributes:
        rank: its number.
        pid: its process.
        exit_code: negative is the number of the signal that ended it.
        is_killed: by the launcher, because another one had failed or it hung.
        outcome: what it wrote about itself; None where it could not.
        tail: the last lines of its log; of rank 0, whose log is the launcher's, none.
    """

    rank: int
    pid: int
    exit_code: int
    is_killed: bool
    outcome: Mapping[str, Any] | None
    tail: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How all ranks ended.

    Attributes:
        ranks: each of them.
        first_failed: the rank that failed first.
        hung_s: how long nothing new had happened, where that was why.
        lost: which machine was lost, where that was why.
    """

    ranks: tuple[RankEnd, ...]
    first_failed: int | None = None
    hung_s: float | None = None
    lost: str | None = None


class Others(Protocol):
    """What a launcher hears of the other machines of its training."""

    def lost(self) -> str | None:
        """Which of them is lost, and how that is known; None while all are there."""
        ...

    def gone(self) -> str | None:
        """The same once ranks here have failed, for which a lost machine may be the reason."""
        ...

    def newcomer(self) -> str | None:
        """A machine that the ranks here are to stop for, so that it can be taken in; or None."""
        ...


class NoOthers:
    """All ranks are on this machine."""

    def lost(self) -> str | None:
        """As ``Others.lost``."""
        return None

    def gone(self) -> str | None:
        """As ``Others.gone``."""
        return None

    def newcomer(self) -> str | None:
        """As ``Others.newcomer``."""
        return None


@dataclass(frozen=True)
class Place:
    """Which of all ranks are started here, and where all meet.

    Attributes:
        size: ranks on all machines together.
        first_rank: the first one here.
        num_here: how many are started here.
        host: the address of the store, as it is reached from here.
        store: over which they meet.
        interface: of the network that they sum over; None lets gloo and NCCL choose.
        others: the other machines.
    """

    size: int
    first_rank: int
    num_here: int
    host: str
    store: TCPStore
    interface: str | None = None
    others: Others = field(default_factory=NoOthers)


class _Rank:
    """A rank's process, and what it says."""

    def __init__(
        self,
        seat: Seat,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        output: IO[str] | None,
    ) -> None:
        self.seat = seat
        self.is_killed = False
        self._tail: deque[str] = deque(maxlen=NUM_TAIL_LINES)
        self._prefix = f"[rank {seat.rank}] " if seat.is_guest else None
        is_first = seat.rank == 0
        with signals_held():  # let through by the rank itself, once it can save
            self.process = subprocess.Popen(
                command,
                env={**environment, **seat.environment()},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output if is_first else subprocess.DEVNULL,
                stderr=None if is_first else subprocess.PIPE,
                text=True,
                errors="replace",
            )
        self._reader: threading.Thread | None = None
        if self.process.stderr is not None:
            self._reader = threading.Thread(
                target=self._read, args=(self.process.stderr,), daemon=True
            )
            self._reader.start()

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        if self.process.poll() is None:
            self.is_killed = True
            self.process.kill()

    def end(self) -> RankEnd:
        """How it ended."""
        code = self.process.wait()
        if self._reader is not None:
            self._reader.join(STACKS_S)
        try:
            outcome = json.loads(self.seat.outcome_file.read_text())
        except (OSError, ValueError):
            outcome = None
        pid, rank = self.process.pid, self.seat.rank
        return RankEnd(rank, pid, code, self.is_killed, outcome, tuple(self._tail))

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._tail.append(line.rstrip("\n"))
                if self._prefix is not None:  # it has no log in the run's folder
                    write_line(f"{self._prefix}{self._tail[-1]}", sys.stderr)


def run_ranks(
    place: Place,
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    hang_timeout_s: float,
    on_started: Callable[[list[int]], None] = lambda _: None,
    output: IO[str] | None = None,
) -> Ended:
    """Start the ranks that belong here, and return when all of them have ended.

    Notices that this process gets are passed on. Where a rank fails or a machine is lost, the
    others have ``END_S`` to end by themselves, and are killed then; where nothing new happens for
    ``hang_timeout_s``, all are asked for their stacks and killed.

    Args:
        place: which ones.
        command: of each rank.
        environments: by rank; its seat is added, which names the file for its outcome.
        folder: where they start.
        hang_timeout_s: as configured.
        on_started: is told the process ids, by rank.
        output: where rank 0 prints; by default where this process does.
    """
    network = {} if place.interface is None else dict.fromkeys(INTERFACES, place.interface)
    with tempfile.TemporaryDirectory(prefix="holdfast-ranks-", ignore_cleanup_errors=True) as told:
        seats = _seats(place, told, 2 * max(hang_timeout_s, STARTING_S))  # after our own
        watch = _Watch(
            place, Silence(Beats(Path(told), len(seats)), hang_timeout_s, NUM_BEATS_OF_START)
        )
        ranks: list[_Rank] = []
        try:
            for seat, own in zip(seats, environments, strict=True):
                ranks.append(_Rank(seat, command, {**own, **network}, folder, output))
            on_started([rank.process.pid for rank in ranks])
            with _signals_passed_on(ranks):
                watch.until_end(ranks)
        finally:
            for rank in ranks:
                rank.kill()
        return watch.ended(tuple(rank.end() for rank in ranks))


def _seats(place: Place, folder: str, timeout_s: float) -> list[Seat]:
    first, num_here = place.first_rank, place.num_here
    return [
        Seat(
            rank=rank,
            size=place.size,
            host=place.host,
            port=place.store.port,
            launcher_pid=os.getpid(),
            folder=folder,
            timeout_s=timeout_s,
            first_rank=first,
            num_here=num_here,
        )
        for rank in range(first, first + num_here)
    ]


class _Watch:
    """Waits until the ranks here have ended, or have to be ended."""

    def __init__(self, place: Place, silence: Silence) -> None:
        self._place = place
        self._silence = silence
        self._end_s = float("inf")
        self._first_failed: int | None = None
        self._hung_s: float | None = None
        self._lost: str | None = None
        self._newcomer: str | None = None

    def until_end(self, ranks: Sequence[_Rank]) -> None:
        """Return when none of the ranks is left that need not be killed."""
        while any(rank.process.poll() is None for rank in ranks):
            if self._end_s == float("inf"):
                self._look(ranks)
            elif self._lost is None:
                self._lost = self._place.others.gone()
            if self._hung_s is not None or time.monotonic() > self._end_s:
                return
            time.sleep(POLL_S)
        self._note_failed(ranks)

    def ended(self, ends: tuple[RankEnd, ...]) -> Ended:
        """How that was."""
        return Ended(ends, self._first_failed, self._hung_s, self._lost)

    def _look(self, ranks: Sequence[_Rank]) -> None:
        """Whether all is well; from when it is not, the ranks have ``END_S``."""
        self._note_failed(ranks)
        self._lost = self._place.others.lost()
        if self._first_failed is not None or self._lost is not None:
            self._end_s = time.monotonic() + END_S
            return
        self._hung_s = self._silence.too_long_s()
        if self._hung_s is not None:
            ask_for_stacks(rank.process.pid for rank in ranks if rank.process.poll() is None)
            told = f"nothing new has happened for {self._hung_s:.0f} s"
            _tell_others(self._place.store, ranks[0].seat.rank, told)
        elif self._newcomer is None and self._silence.has_begun():
            self._make_room(ranks[0])

    def _note_failed(self, ranks: Sequence[_Rank]) -> None:
        if self._first_failed is not None:
            return
        for rank in ranks:
            code = rank.process.poll()
            if code is not None and code not in GOOD_CODES:
                self._first_failed = rank.seat.rank
                if code < 0:  # it cannot have said so itself
                    told = f"ended by {signal.Signals(-code).name}"
                    _tell_others(self._place.store, rank.seat.rank, told)
                return

    def _make_room(self, first: _Rank) -> None:
        """Have all ranks stop, where a machine has come that can be taken in."""
        self._newcomer = self._place.others.newcomer()
        if self._newcomer is not None:
            self._place.store.set(NEWCOMER, json.dumps(self._newcomer))
            first.process.terminate()


def _tell_others(store: TCPStore, rank: int, why: str) -> None:
    """Say for a rank why it has ended."""
    with contextlib.suppress(RuntimeError):  # another machine has it, which may be gone
        store.set(ERROR.format(rank), json.dumps(why))


@contextlib.contextmanager
def _signals_passed_on(ranks: Sequence[_Rank]) -> Iterator[None]:
    """Each notice signal of this process reaches every rank, those before included."""

    def pass_on(received: ReceivedSignal) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid, signal.Signals[received.name])

    flag = current_signal_flag()
    flag.listen(pass_on)
    try:
        yield
    finally:
        flag.leave(pass_on)


@contextlib.contextmanager
def place_of_all(size: int) -> Iterator[Place]:
    """Where all ranks are on this machine: they meet on a port that the system chooses.

    Raises StorageError where they cannot.
    """
    try:
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise StorageError(
            f"processes cannot meet on this machine: no port of {HOST} can be taken: {error}"
        ) from error
    yield Place(size, 0, size, HOST, store)
