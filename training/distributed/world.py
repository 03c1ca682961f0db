"""The ranks of one training: what they tell each other, and what they do together.

Everything of one training goes over the launcher's store and torch.distributed: gloo for what lies
in memory, NCCL for what lies on GPUs.

A rank that waits for another that has ended, or hangs, raises ``RankLostError``. Where that one is
on another machine, and nobody says why it has ended, the machine is lost: ``MachineLostError``.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from holdfast.training.distributed.seat import Beats, Seat
from holdfast.training.errors import MachineLostError, RankLostError

HOST = "127.0.0.1"
ERROR = "error/{}"
NEWCOMER = "newcomer"
"""The machine that all ranks stop for, so that it can be taken in."""
LOST = "lost"
"""The machine of which nothing was heard, as the launcher says that has the store."""
ERROR_WAIT_S = 1.0
POLL_S = 0.02
ASK_EVERY = timedelta(seconds=1)

Wait = Callable[[], None]
"""Returns once what was begun has ended. Raises RankLostError."""


class World:
    """What one rank knows of all. To be used by one thread.

    Collective calls must be made by every rank, in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        seat: what its launcher has told it, where it has one.
    """

    def __init__(self, rank: int, size: int, store: Any = None, beats: Beats | None = None) -> None:
        self.rank = rank
        self.size = size
        self.seat: Seat | None = None
        self._store = store
        self._beats = beats
        self._group: Any = None  # of all, torch's own
        self._num_turns = 0

    @classmethod
    def alone(cls) -> Self:
        """A world of one rank, without a launcher."""
        return cls(0, 1)

    @classmethod
    @contextlib.contextmanager
    def joined(cls, seat: Seat) -> Iterator[Self]:
        """The world of a seat, once all ranks are there. Raises RankLostError where one is not."""
        timeout = timedelta(seconds=seat.timeout_s)
        try:
            store = TCPStore(seat.host, seat.port, is_master=False, timeout=timeout)
            if seat.size > 1:
                groups = PrefixStore("groups", store)
                dist.init_process_group(
                    _backend(), store=groups, rank=seat.rank, world_size=seat.size, timeout=timeout
                )
        except RuntimeError as error:
            raise RankLostError(
                f"not all of {seat.size} processes came: {_short(error)}"
            ) from error
        world = cls(seat.rank, seat.size, store, Beats(Path(seat.folder), seat.num_here))
        world.seat = seat
        world.beat()
        try:
            yield world
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    @property
    def launcher_pid(self) -> int | None:
        """The process that has started this rank, where one has."""
        return None if self.seat is None else self.seat.launcher_pid

    @property
    def first_here(self) -> int:
        """The first rank of this machine."""
        return 0 if self.seat is None else self.seat.first_rank

    def beat(self) -> None:
        """Let the launcher know that this rank does something."""
        if self._beats is not None:
            self._beats.beat(self.rank - self.first_here)

    def for_thread(self) -> Self:
        """The same world over a connection of its own, for another thread's ``tell``."""
        beside = type(self)(self.rank, self.size, self._store.clone())
        beside.seat = self.seat
        return beside

    def for_carrying(self) -> Self:
        """Collective. As ``for_thread``, and for its ``send`` and ``receive``, too."""
        beside = self.for_thread()
        beside._group = dist.new_group(backend="gloo", timeout=self._store.timeout)
        return beside

    def awaited(self, key: str) -> Any:
        """The JSON that another rank writes, however long that takes.

        Raises RankLostError once any rank has ended before.
        """
        with self._lost_ranks_told():
            while not self._store.check([key]):
                told = self._errors_so_far()
                if told and not self._store.check([key]):
                    raise self._lost(told)
                self._require_all_machines()
                time.sleep(POLL_S)
            return json.loads(self._store.get(key))

    def tell(self, key: str, value: Any) -> None:
        """Write JSON for the others."""
        if self._store is not None:
            self._store.set(key, json.dumps(value))

    def told(self, key: str) -> Any:
        """The JSON that another rank writes; waits for it. Raises RankLostError."""
        with self._lost_ranks_told():
            self._come(key)
            return json.loads(self._store.get(key))

    def told_so_far(self, key: str) -> Any | None:
        """The JSON that another rank has written, or None. Does not wait. Raises RankLostError."""
        if self._store is None:
            return None
        with self._lost_ranks_told():
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def from_first(self, value: Any) -> Any:
        """Collective. The JSON value that rank 0 gives."""
        if self.size == 1:
            return value
        key = self._turn()
        if self.rank == 0:
            self.tell(key, value)
            return value
        return self.told(key)

    def gathered(self, value: Any) -> list[Any]:
        """Collective. The JSON values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        key = self._turn()
        self.tell(f"{key}/{self.rank}", value)
        return [self.told(f"{key}/{rank}") for rank in range(self.size)]

    def is_any(self, flag: bool) -> bool:
        """Collective. Whether any rank says yes."""
        return bool(self.sum_of(torch.tensor([float(flag)], dtype=torch.float64)).item())

    def sum_of(self, values: Tensor) -> Tensor:
        """Collective. Sums over the ranks, in place; exact where one alone is not zero."""
        if self.size > 1:
            self.begin_sum(values)()
        return values

    def copy_from_first(self, values: Tensor) -> None:
        """Collective. Put there what rank 0 has."""
        with self._lost_ranks_told():
            work = dist.broadcast(values, 0, async_op=True)
        self._waiting(work, values)()

    def begin_sum(self, values: Tensor) -> Wait:
        """Collective. As ``sum_of``, on its way until the result is waited for."""
        with self._lost_ranks_told():
            return self._waiting(dist.all_reduce(values, async_op=True), values)

    def begin_exchange(
        self, parts: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, Wait]:
        """Collective. ``sent[k]`` consecutive elements go to rank k.

        Returns what all others send here, once it was waited for.
        """
        taken = parts.new_empty(sum(received))
        with self._lost_ranks_told():
            work = dist.all_to_all_single(taken, parts, list(received), list(sent), async_op=True)
        return taken, self._waiting(work, parts)

    def begin_join(self, slice_: Tensor, whole: Tensor) -> Wait:
        """Collective. Put the slices of all ranks, of one size each, together into ``whole``."""
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._lost_ranks_told():
            return self._waiting(gather(whole, slice_, async_op=True), slice_)

    def send(self, content: Tensor, rank: int) -> None:
        """Send bytes to a rank, which must ``receive`` them."""
        with self._lost_ranks_told():
            dist.send(content, rank, self._group)

    def receive(self, num_bytes: int, rank: int) -> Tensor:
        """As many bytes as a rank sends."""
        content = torch.empty(num_bytes, dtype=torch.uint8)
        with self._lost_ranks_told():
            dist.recv(content, rank, self._group)
        return content

    def tell_error(self, error: BaseException) -> None:
        """Let the others know why this rank ends, unless it ends because of another one."""
        if not isinstance(error, RankLostError):
            with contextlib.suppress(RuntimeError):  # the launcher may be gone
                self.tell(ERROR.format(self.rank), f"{type(error).__name__}: {error}")

    def _turn(self) -> str:
        self._num_turns += 1
        return f"turn/{self._num_turns}"

    @contextlib.contextmanager
    def lost_ranks_found(self) -> Iterator[None]:
        """For what meets the others within torch: an error because of them is a RankLostError."""
        try:
            yield
        except RuntimeError as error:
            if (lost := self.lost_by(error)) is None:
                raise
            raise lost from error

    def lost_by(self, error: BaseException) -> RankLostError | None:
        """That the others are gone, where torch says so by an error of its own."""
        told = str(error).lower()
        is_theirs = any(word in told for word in ("gloo", "nccl", "connection"))
        if not isinstance(error, RuntimeError) or not is_theirs:
            return None
        return self._lost(self._errors_of_others(), _short(error))

    def _waiting(self, work: Any, values: Tensor) -> Wait:
        def wait() -> None:
            with self._lost_ranks_told():
                if values.is_cuda:
                    work.wait()  # the GPU waits; a machine that is lost then, the launcher sees
                else:
                    self._finish(work)

        return wait

    def _finish(self, work: Any) -> None:
        """Wait for torch's work; what another machine may never do, until that one is lost."""
        while self._has_other_machines and not work.is_completed():
            with contextlib.suppress(RuntimeError):  # an error of its own is raised below
                work.wait(ASK_EVERY)
                return
            self._require_all_machines()
        work.wait()

    def _come(self, key: str) -> None:
        """Wait for what another machine may never write, until that one is lost."""
        while self._has_other_machines:
            try:
                self._store.wait([key], ASK_EVERY)
                return
            except dist.DistStoreError:  # not yet
                self._require_all_machines()

    @property
    def _has_other_machines(self) -> bool:
        return self.seat is not None and self.seat.num_here < self.size

    def _require_all_machines(self) -> None:
        """Raise MachineLostError where nothing more is heard of one that takes part."""
        if self._has_other_machines and self._store.check([LOST]):
            raise self._lost([], json.loads(self._store.get(LOST)))

    @contextlib.contextmanager
    def _lost_ranks_told(self) -> Iterator[None]:
        """What torch.distributed raises becomes a RankLostError that says what the others said."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(self._errors_of_others(), _short(error)) from error

    def _lost(self, told: Sequence[str], why: str = "") -> RankLostError:
        """The error for what others say that ended them, or else for what was found here."""
        prefix = f"rank {self.rank} of {self.size} cannot go on: "
        if not told and self._has_other_machines:
            return MachineLostError(f"{prefix}another machine is lost: {why}")
        return RankLostError(prefix + ("; ".join(told) or f"a process has ended or hangs: {why}"))

    def _errors_of_others(self) -> list[str]:
        """What other ranks say that ended them; they may need a moment to say it."""
        deadline_s = time.monotonic() + ERROR_WAIT_S
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline_s:
                if said := self._errors_so_far():
                    return said
                time.sleep(POLL_S)
        return []

    def _errors_so_far(self) -> list[str]:
        keys = {rank: ERROR.format(rank) for rank in range(self.size) if rank != self.rank}
        found = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return [f"rank {rank}: {json.loads(self._store.get(key))}" for rank, key in found.items()]


def _backend() -> str:
    """For each kind of memory; NCCL begins with the first sum on GPUs."""
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if has_nccl else "gloo"


def _short(error: Exception) -> str:
    """What torch says, without the stack that it adds."""
    return " ".join(str(error).split("Exception raised from")[0].split())[:300]
