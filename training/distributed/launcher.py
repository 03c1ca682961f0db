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
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch._C._distributed_c10d import TCPStore

from holdfast.training.distributed.seat import Beats, Seat, without_seat
from holdfast.training.distributed.watchdog import STACKS_S, STARTING_S, Silence, ask_for_stacks
from holdfast.training.distributed.world import ERROR, HOST
from holdfast.training.errors import StorageError
from holdfast.training.preemption.signals import (
    ReceivedSignal,
    current_signal_flag,
    signals_held,
)

POLL_S = 0.02
END_S = 10.0
"""How long ranks may take to end by themselves once one has failed: they learn of it within a
second, and rank 0 lets the save in flight end."""
NUM_BEATS_OF_START = 3  # when it has met the others, and around its first step
NUM_TAIL_LINES = 400
GOOD_CODES = (0, 75)


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
    """How all ranks ended; ``hung_s`` is how long nothing new had happened, where that was why."""

    ranks: tuple[RankEnd, ...]
    first_failed: int | None = None
    hung_s: float | None = None


class _Rank:
    """A rank's process, and what it says."""

    def __init__(
        self, seat: Seat, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self.seat = seat
        self.is_killed = False
        self._tail: deque[str] = deque(maxlen=NUM_TAIL_LINES)
        is_first = seat.rank == 0
        with signals_held():  # let through by the rank itself, once it can save
            self.process = subprocess.Popen(
                [*command, "--outcome-file", str(seat.outcome_file)],
                env={**without_seat(environment), **seat.environment()},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=None if is_first else subprocess.DEVNULL,
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


def run_ranks(
    size: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    hang_timeout_s: float,
    on_started: Callable[[list[int]], None] = lambda _: None,
) -> Ended:
    """Start ``size`` processes, and return when all have ended.

    Notices that this process gets are passed on. Where a rank fails, the others have ``END_S`` to
    end by themselves, and are killed then; where nothing new happens for ``hang_timeout_s``, all
    are asked for their stacks and killed.

    Args:
        size: how many.
        command: of each rank; ``--outcome-file PATH`` is added.
        environment: of each rank; its seat is added.
        folder: where they start.
        hang_timeout_s: as configured.
        on_started: is told the process ids, by rank.

    Raises StorageError where the ranks cannot meet.
    """
    with (
        tempfile.TemporaryDirectory(prefix="holdfast-ranks-", ignore_cleanup_errors=True) as own,
        _meeting_place() as store,
    ):
        timeout_s, pid = 2 * max(hang_timeout_s, STARTING_S), os.getpid()  # after our own
        seats = [Seat(rank, size, store.port, pid, own, timeout_s) for rank in range(size)]
        beats = Beats(Path(own), size)
        ranks: list[_Rank] = []
        try:
            for seat in seats:
                ranks.append(_Rank(seat, command, environment, folder))
            on_started([rank.process.pid for rank in ranks])
            with _signals_passed_on(ranks):
                first_failed, hung_s = _watch(ranks, beats, store, hang_timeout_s)
        finally:
            for rank in ranks:
                rank.kill()
        return Ended(tuple(rank.end() for rank in ranks), first_failed, hung_s)


def _watch(
    ranks: Sequence[_Rank], beats: Beats, store: TCPStore, hang_timeout_s: float
) -> tuple[int | None, float | None]:
    """Wait until all have ended. The rank that failed first, and for how long all hung."""
    first_failed, end_s = None, float("inf")
    silence = Silence(beats, hang_timeout_s, NUM_BEATS_OF_START)
    while True:
        codes = [rank.process.poll() for rank in ranks]
        if None not in codes:
            failed = [n for n, code in enumerate(codes) if code not in GOOD_CODES]
            return first_failed if first_failed is not None else next(iter(failed), None), None
        now_s = time.monotonic()
        if first_failed is None:
            failed = [n for n, code in enumerate(codes) if code not in (None, *GOOD_CODES)]
            if failed:
                first_failed, end_s = failed[0], now_s + END_S
                _tell_others(store, first_failed, codes[first_failed])
        if now_s > end_s:
            return first_failed, None
        hung_s = silence.too_long_s()
        if hung_s is not None and first_failed is None:
            ask_for_stacks(rank.process.pid for rank in ranks if rank.process.poll() is None)
            return None, hung_s
        time.sleep(POLL_S)


def _tell_others(store: TCPStore, rank: int, code: int | None) -> None:
    """For a rank that a signal has ended, which cannot say so itself."""
    if code is not None and code < 0:
        store.set(ERROR.format(rank), json.dumps(f"ended by {signal.Signals(-code).name}"))


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
def _meeting_place() -> Iterator[TCPStore]:
    """The store over which ranks meet, on a port that the system chooses."""
    try:
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise StorageError(
            f"processes cannot meet on this machine: no port of {HOST} can be taken: {error}"
        ) from error
    yield store
