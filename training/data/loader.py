"""The loader: microbatches from any place of a run on, endlessly, the same from everywhere.

Which samples a step holds comes from a ``BatchPlan``; what their augmentation draws is seeded
from (seed, epoch, position). So the batches do not depend on how a process got to a place, on
the number of loader processes, or on how far ahead they work.

With loader processes the data set travels to them, hence must be picklable; a class from a file
outside of the project is found by its file.
"""

from __future__ import annotations

import atexit
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from holdfast.training.data.ahead import FetchedAhead
from holdfast.training.data.batch_plan import BatchPlan, FixedSizePlan, OwnOrderPlan, TokenPlan
from holdfast.training.data.fetching import (
    Failure,
    Fetcher,
    Place,
    Shares,
    pinned,
    sequential_places,
)
from holdfast.training.data.loader_process import WorkerSetup, start_fork_server
from holdfast.training.data.permutation import Permutation
from holdfast.training.errors import InputError, LoaderError
from holdfast.training.exactness.seeding import derive_seed
from holdfast.training.experiment.protocol import Dataset
from holdfast.training.experiment.streamed import Carried, Streamed

__all__ = [
    "BatchPlan",
    "FixedSizePlan",
    "Loader",
    "Microbatch",
    "OwnOrderPlan",
    "Permutation",
    "TokenPlan",
]

WorkerInit = Callable[[int], None]
_KILL_TIMEOUT_S = 10.0
STEPS_PER_BLOCK = 64
"""Whose places are found at once: one by one, between steps that fill the caches, costs more."""
SHARED_MEMORY_WORDS = ("shared memory", "(shm)", "bus error")  # torch's, in its errors
FULL_SHARED_MEMORY = (
    "/dev/shm, through which loader processes are sent their data set and send batches, is full: "
    "enlarge it (docker run --shm-size, an emptyDir of medium Memory), or use fewer "
    "data.num_workers, a smaller data.prefetch_factor or smaller microbatches"
)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One forward and backward pass of a step, and its place in the run.

    ``is_last_in_step``: it is this process's last one of the step.
    """

    epoch: int
    step_in_epoch: int
    number: int
    num_in_step: int
    num_samples: int
    num_samples_in_step: int
    batch: Any
    shard: int = 0
    num_shards: int = 1
    stream_state: Any = None
    is_last_in_step: bool = True

    @property
    def weight(self) -> float:
        """What its mean loss counts in the step's mean; the weights of a step add up to 1."""
        return self.num_samples / self.num_samples_in_step


class Loader:
    """Microbatches of a data set in the order of a plan.

    ``num_microbatches`` cuts a step's samples into nearly equal parts, or fewer where there are
    not enough. With ``shares`` a step is cut into shards first, and each of them into
    microbatches; the microbatches are those of the shards that are this process's.
    ``num_workers``, ``has_persistent_workers`` and ``prefetch_factor`` never change a byte. With
    ``fork`` the data set need not be picklable, and a program's main module is not imported again.
    With ``is_ahead`` a process that fetches itself does so for some later steps, too, where that is
    quickly done; as with loader processes, what items are must not depend on the training then.
    A stream (``Streamed``) is read by one process, whatever their number; each of its microbatches
    has the stream's state after it. ``worker_init_fn`` is called in each loader process, with its
    number, before the first fetch; SIGINT, SIGTERM and SIGUSR1 are ignored there anyway.
    """

    def __init__(  # noqa: PLR0913  # one per configured key
        self,
        dataset: Dataset,
        plan: BatchPlan,
        *,
        num_microbatches: int = 1,
        num_workers: int = 0,
        has_persistent_workers: bool = True,
        prefetch_factor: int = 2,
        seed: int,
        should_pin: bool = False,
        worker_init_fn: WorkerInit | None = None,
        start_method: Literal["forkserver", "fork"] = "forkserver",
        shares: Shares | None = None,
        is_ahead: bool = False,
    ) -> None:
        self._dataset = dataset
        self._fetcher = Fetcher(dataset, seed, should_tell_epoch=True)
        self._plan = plan
        self._num_microbatches = num_microbatches
        self._num_workers = min(num_workers, 1) if isinstance(dataset, Streamed) else num_workers
        self._has_persistent_workers = has_persistent_workers
        self._prefetch_factor = prefetch_factor
        self._seed = seed
        self._should_pin = should_pin
        self._worker_init_fn = worker_init_fn
        self._start_method = start_method
        self._shares = shares or Shares()
        self._is_ahead = is_ahead and not isinstance(dataset, Streamed)
        self._pool: _WorkerPool | None = None
        if num_workers and start_method == "forkserver":
            start_fork_server()

    @property
    def dataset(self) -> Dataset:
        """The data set that microbatches are fetched from."""
        return self._dataset

    @property
    def plan(self) -> BatchPlan:
        """The order that microbatches come in."""
        return self._plan

    def steps(
        self, epoch: int, step_in_epoch: int, stream_state: Any = None
    ) -> Iterator[Microbatch]:
        """The microbatches from the start of a step on, over all later epochs, without an end.

        ``step_in_epoch`` may be the number of the epoch's steps, which is the next epoch's start.
        A new call ends the iterator of the one before. ``stream_state`` is what came with the last
        microbatch before, where the data are a stream. Raises LoaderError, which names the sample
        or the place.
        """
        self.close()
        if step_in_epoch == self._plan.num_steps(epoch):
            epoch, step_in_epoch = epoch + 1, 0
        if isinstance(self._dataset, Streamed):
            first = int(self._plan.indices(epoch, step_in_epoch)[0])
            self._dataset.go_to(first, stream_state)
        batches = self._worker_batches if self._num_workers else self._own_batches
        return batches(epoch, step_in_epoch)

    def close(self) -> None:
        """End all loader processes; a later ``steps`` starts anew. Iterators from before end.

        The fork server, idle and without data, stays until this process ends.
        """
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _own_batches(self, epoch: int, step_in_epoch: int) -> Iterator[Microbatch]:
        ahead = FetchedAhead(self._own_batch, is_ahead=self._is_ahead)
        for places in self._blocks(epoch, step_in_epoch, is_endless=True):
            for place, batch in ahead.batches(places):
                yield _microbatch(place, batch)

    def _own_batch(self, place: Place) -> Any:
        batch = self._fetcher.fetch_isolated(place)
        return pinned(batch) if self._should_pin else batch

    def _worker_batches(self, epoch: int, step_in_epoch: int) -> Iterator[Microbatch]:
        is_endless = self._has_persistent_workers
        while True:
            pool = self._pool = self._start_pool(self._blocks(epoch, step_in_epoch, is_endless))
            try:
                for place, batch in pool:
                    yield _microbatch(place, batch)
            finally:
                pool.close()
            if self._pool is not pool:  # closed, or started again from elsewhere
                return
            epoch, step_in_epoch = epoch + 1, 0

    def _start_pool(self, blocks: Iterator[list[Place]]) -> _WorkerPool:
        pending: deque[Place] = deque()
        with warnings.catch_warnings():
            # The number of processes is configured; the machine that goes on may have fewer cores.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            # The error that follows says it better.
            warnings.filterwarnings("ignore", message="Got pickle error")
            loader: DataLoader[Any] = DataLoader(
                self._fetcher,  # type: ignore[arg-type]  # a map-style data set by its methods
                batch_size=None,
                sampler=_recorded(chain.from_iterable(blocks), pending),
                num_workers=self._num_workers,
                prefetch_factor=self._prefetch_factor,
                collate_fn=_unchanged,
                worker_init_fn=WorkerSetup.here(self._worker_init_fn),
                multiprocessing_context=self._start_method,
                generator=torch.Generator().manual_seed(derive_seed(self._seed, "workers")),
                pin_memory=self._should_pin,
            )
            return _WorkerPool(loader, pending)

    def _blocks(self, epoch: int, step_in_epoch: int, is_endless: bool) -> Iterator[list[Place]]:
        """Places in order, some steps of one epoch at a time."""
        for current in count(epoch) if is_endless else (epoch,):
            start = step_in_epoch if current == epoch else 0
            end = self._plan.num_steps(current)
            for first in range(start, end, STEPS_PER_BLOCK):
                steps = range(first, min(first + STEPS_PER_BLOCK, end))
                yield [place for step in steps for place in self._places_of(current, step)]

    def _places_of(self, epoch: int, step: int) -> list[Place]:
        """Where the microbatches of a step stand; of those that are this process's."""
        indices = self._plan.indices(epoch, step)
        return self._shares.places(self._seed, epoch, step, indices, self._num_microbatches)


class _WorkerPool:
    """Loader processes at work, and the places whose batches are still to come, in order."""

    def __init__(self, loader: DataLoader[Any], pending: deque[Place]) -> None:
        self._pending = pending
        self._iterator: Any = iter(())
        # multiprocessing's own exit handler, which runs after this one, would wait for processes
        # that it has sent a SIGTERM, which they ignore.
        atexit.register(self.close)
        try:
            self._iterator = iter(loader)
        except RuntimeError as error:
            self.close()
            if _is_about_shared_memory(error):
                raise LoaderError(FULL_SHARED_MEMORY) from error
            raise
        except (AttributeError, TypeError, ValueError) as error:  # what pickling raises
            self.close()
            raise InputError(
                f"the data set cannot be sent to a loader process: {error}; define its class and "
                "functions at the top of a module, or set data.num_workers=0"
            ) from error

    def __iter__(self) -> Iterator[tuple[Place, Any]]:
        while True:
            try:
                batch = next(self._iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if _is_about_shared_memory(error):
                    raise LoaderError(FULL_SHARED_MEMORY) from error
                if not self._is_a_process_dead():
                    raise
                raise LoaderError(
                    f"a loader process died while {self._pending[0]} was awaited ({error}); often "
                    "the machine is short of memory: use fewer data.num_workers, a smaller "
                    "data.prefetch_factor or smaller microbatches"
                ) from error
            if isinstance(batch, Failure):
                raise batch.error()
            yield self._pending.popleft(), batch

    def _is_a_process_dead(self) -> bool:
        """Its connection may be seen to break a moment before the process is seen to be dead."""
        for _ in range(20):
            if not all(process.is_alive() for process in self._iterator._workers):
                return True
            time.sleep(0.05)
        return False

    def close(self) -> None:
        """End the processes; those that don't leave by themselves are killed."""
        atexit.unregister(self.close)
        iterator, self._iterator = self._iterator, iter(())
        if not hasattr(iterator, "_workers"):
            return
        iterator._shutdown_workers()
        for process in iterator._workers:
            if process.is_alive():
                process.kill()  # it ignores SIGTERM, which DataLoader has tried
                process.join(_KILL_TIMEOUT_S)


def evaluation_batches(
    dataset: Dataset, batch_size: int, first: int = 0, every: int = 1
) -> Iterator[Any]:
    """All samples in the order of the data set, in batches; the last one may be smaller.

    What items draw depends on their position alone; ``first`` batches are left out, and of the
    others all but each ``every``-th. Raises LoaderError.
    """
    seed = derive_seed(0, "evaluation")
    fetcher = Fetcher(dataset, seed)
    for place in sequential_places(seed, len(dataset), batch_size)[first::every]:
        yield fetcher.fetch_isolated(place)


def whole_steps(microbatches: Iterable[Microbatch]) -> Iterator[list[Microbatch]]:
    """This process's microbatches of each step. None of the next one is asked for before it."""
    step: list[Microbatch] = []
    for microbatch in microbatches:
        step.append(microbatch)
        if microbatch.is_last_in_step:
            yield step
            step = []


def _microbatch(place: Place, batch: Any) -> Microbatch:
    batch, state = (batch.batch, batch.state) if isinstance(batch, Carried) else (batch, None)
    return Microbatch(
        place.epoch,
        place.step_in_epoch,
        place.number,
        place.num_in_step,
        len(place.indices),
        place.num_samples_in_step,
        batch,
        place.shard,
        place.num_shards,
        state,
        place.is_last_in_step,
    )


def _is_about_shared_memory(error: BaseException) -> bool:
    return any(words in str(error).lower() for words in SHARED_MEMORY_WORDS)


def _recorded(places: Iterator[Place], pending: deque[Place]) -> Iterator[Place]:
    for place in places:
        pending.append(place)
        yield place


def _unchanged(batch: Any) -> Any:
    return batch
