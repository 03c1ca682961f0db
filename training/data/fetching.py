"""One microbatch of a data set: fetched in the training process, or in a loader process."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from holdfast.training.data.permutation import Int64Array
from holdfast.training.distributed.gradient_tree import shards_of_rank
from holdfast.training.errors import HoldfastError, InputError, LoaderError
from holdfast.training.exactness.seeding import IsolatedGenerators, derive_seed, seed_fetch
from holdfast.training.experiment.error_places import described
from holdfast.training.experiment.nests import with_each
from holdfast.training.experiment.protocol import Dataset, collate
from holdfast.training.experiment.streamed import Streamed

SOURCE_DEPTH = 3
NUM_LOOKED_INTO = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Where a microbatch stands in the run, and which samples it holds.

    What these draw is seeded from ``seed``. ``is_last_in_step``: it is this process's last one.
    """

    epoch: int
    step_in_epoch: int
    number: int
    num_in_step: int
    num_samples_in_step: int
    seed: int
    indices: Int64Array
    shard: int = 0
    num_shards: int = 1
    is_last_in_step: bool = True

    def __str__(self) -> str:
        return (
            f"pass {self.epoch} over the data, step {self.step_in_epoch} of it, "
            f"microbatch {self.number + 1} of {self.num_in_step}"
        )


@dataclass(frozen=True)
class Failure:
    """An error on its way from a loader process."""

    is_input_error: bool
    message: str
    traceback: str

    def error(self) -> HoldfastError:
        """The error again, with the traceback of the loader process as a note."""
        error = InputError(self.message) if self.is_input_error else LoaderError(self.message)
        error.add_note(f"In the loader process:\n{self.traceback}")
        return error


class Fetcher:
    """Fetches microbatches; what their items draw depends on (seed, epoch, position) alone.

    With ``should_tell_epoch``, a data set that has ``set_epoch`` is told each epoch before its
    first fetch in this process.
    """

    def __init__(self, dataset: Dataset, seed: int, should_tell_epoch: bool = False) -> None:
        self._dataset = dataset
        self._seed = seed
        self._fetch: Callable[[list[int]], Any] | None = getattr(dataset, "fetch", None)
        self._generators: IsolatedGenerators | None = None
        self._should_tell_epoch = should_tell_epoch
        is_told = should_tell_epoch and callable(getattr(dataset, "set_epoch", None))
        self._told_epoch: int | None = -1 if is_told else None
        self._num_samples = len(dataset) if is_told else 0

    def fetch_isolated(self, place: Place) -> Any:
        """The batch, with the generators of this process untouched. Raises LoaderError.

        None for a place without samples: a rank without a shard of a step.
        """
        if not len(place.indices):
            return None
        if self._generators is None:
            self._generators = IsolatedGenerators()
        if self._is_news(place):
            self._generators.run(self._epoch_seed(place), self._tell_epoch, place)
        return self._generators.run(place.seed, self._batch, place)

    def __getitem__(self, place: Place) -> Any:
        """The batch, or why there is none, in a process that does nothing else."""
        if not len(place.indices):
            return None
        try:
            if self._is_news(place):
                seed_fetch(self._epoch_seed(place))
                self._tell_epoch(place)
            seed_fetch(place.seed)
            return self._batch(place)
        except HoldfastError as error:
            return Failure(isinstance(error, InputError), str(error), traceback.format_exc())

    def __reduce__(self) -> tuple[Any, ...]:
        sources = _sources(self._dataset)
        return _rebuild, (sources, self._dataset, self._seed, self._should_tell_epoch)

    def _is_news(self, place: Place) -> bool:
        return self._told_epoch is not None and place.epoch != self._told_epoch

    def _epoch_seed(self, place: Place) -> int:
        return derive_seed(self._seed, "set_epoch", place.epoch)

    def _tell_epoch(self, place: Place) -> None:
        dataset: Any = self._dataset
        call = f"set_epoch({place.epoch}) of {type(dataset).__name__}"
        try:
            dataset.set_epoch(place.epoch)
        except HoldfastError:
            raise
        except Exception as error:
            raise LoaderError(f"{call} failed: {described(error)}") from error
        if len(dataset) != self._num_samples:
            raise InputError(
                f"{call} changed its length from {self._num_samples} to {len(dataset)} samples, "
                f"and a data set keeps its length: let its order(epoch) give the indices of the "
                f"samples that an epoch has"
            )
        self._told_epoch = place.epoch

    def _batch(self, place: Place) -> Any:
        if isinstance(self._dataset, Streamed):
            return self._guarded(
                lambda _: self._dataset.next_batch(place.indices),  # type: ignore[attr-defined]
                [],
                place,
                "the next samples of the stream from",
            )
        indices = place.indices.tolist()
        if self._fetch is not None:
            return self._guarded(self._fetch, indices, place, "the samples")
        dataset = self._dataset
        items = []
        index = -1
        try:
            for index in indices:
                items.append(dataset[index])
        except HoldfastError:
            raise
        except Exception as error:
            raise LoaderError(_failure(f"sample {index}", place, error)) from error
        return self._guarded(lambda items: collate(dataset, items), items, place, "the samples")

    @staticmethod
    def _guarded(
        function: Callable[[list[Any]], Any], argument: list[Any], place: Place, what: str
    ) -> Any:
        try:
            return function(argument)
        except HoldfastError:
            raise
        except Exception as error:
            named = f"{what} {place.indices[:8].tolist()}{' ...' if len(argument) > 8 else ''}"
            raise LoaderError(_failure(named, place, error)) from error


def _failure(what: str, place: Place, error: Exception) -> str:
    message = f"{what} could not be loaded ({place}): {described(error)}"
    if isinstance(error, IndexError):
        message += "; the data set must return every index from 0 to its length"
    return message


def pinned(batch: Any) -> Any:
    """The batch with every tensor in page-locked memory, for copies that don't block."""
    if hasattr(batch, "pin_memory"):
        return batch.pin_memory()
    return with_each(pinned, batch)


@dataclass(frozen=True)
class ModuleSource:
    """A module that may be known by its file alone. Unpickling it makes the module importable."""

    name: str
    file: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _ensure_module, (self.name, self.file)


def _sources(dataset: Dataset) -> tuple[ModuleSource, ...]:
    """The modules of the data set's class, of its attributes' classes, and of what these hold.

    Of a function among them, its own.
    """
    names = {
        part.__module__
        for value in _held(dataset, SOURCE_DEPTH)
        for part in (value, *type(value).__mro__)
        if isinstance(part, (type, FunctionType))
    }
    modules = [
        (name, getattr(sys.modules.get(name), "__file__", None))
        for name in sorted(filter(None, names))
    ]
    return tuple(ModuleSource(name, file) for name, file in modules if file and name != "__main__")


def _held(value: Any, depth: int) -> Iterator[Any]:
    """A value and what it holds; of a long container, what comes first."""
    yield value
    if depth:
        items = value.values() if isinstance(value, dict) else value
        first = islice(items, NUM_LOOKED_INTO) if isinstance(value, (dict, list, tuple)) else ()
        for inner in (*first, *getattr(value, "__dict__", {}).values()):
            yield from _held(inner, depth - 1)


def _ensure_module(name: str, file: str) -> ModuleSource:
    if name not in sys.modules:
        try:
            import_module(name)
        except ModuleNotFoundError:
            _load_file(name, Path(file))
    return ModuleSource(name, file)


def _load_file(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _rebuild(
    sources: tuple[ModuleSource, ...], dataset: Dataset, seed: int, should_tell_epoch: bool
) -> Fetcher:
    del sources  # unpickling them was their purpose; it comes first, because they stand first
    return Fetcher(dataset, seed, should_tell_epoch)


def cut(indices: Int64Array, num_parts: int) -> list[tuple[int, Int64Array]]:
    """Nearly equal consecutive parts, none of them empty, each with its first position."""
    num_parts = min(num_parts, len(indices))
    bounds = [len(indices) * part // num_parts for part in range(num_parts + 1)]
    return [(first, indices[first:end]) for first, end in pairwise(bounds)]


@dataclass(frozen=True)
class Shares:
    """How steps are cut into shards, and which of them are this process's.

    See ``shards_of_rank``.
    """

    num_shards: int = 1
    rank: int = 0
    num_ranks: int = 1
    are_dealt: bool = False

    def places(
        self, seed: int, epoch: int, step: int, indices: Int64Array, num_microbatches: int
    ) -> list[Place]:
        """The places of this process's shards; one without samples where it has none.

        ``seed`` is what the seed of each is derived from.
        """
        parts = [
            (shard, start + first, part)
            for shard, (start, samples) in enumerate(cut(indices, self.num_shards))
            for first, part in cut(samples, num_microbatches)
        ]
        num_shards = parts[-1][0] + 1
        own = shards_of_rank(num_shards, self.rank, self.num_ranks, are_dealt=self.are_dealt)
        if not own:
            told = (0, len(parts), len(indices), 0, indices[:0], -1, num_shards)
            return [Place(epoch, step, *told)]
        mine = [(number, *part) for number, part in enumerate(parts) if part[0] in own]
        return [
            Place(
                epoch,
                step,
                number,
                len(parts),
                len(indices),
                _fetch_seed(seed, epoch, step, first),
                part,
                shard,
                num_shards,
                is_last_in_step=number == mine[-1][0],
            )
            for number, shard, first, part in mine
        ]


def sequential_places(seed: int, num_samples: int, batch_size: int) -> list[Place]:
    """The places of an evaluation: all samples in the order of the data set."""
    order = np.arange(num_samples, dtype=np.int64)
    return [
        Place(0, number, 0, 1, len(indices), _fetch_seed(seed, 0, number, 0), indices)
        for number, indices in enumerate(
            order[first : first + batch_size] for first in range(0, num_samples, batch_size)
        )
    ]


def _fetch_seed(root: int, epoch: int, step_in_epoch: int, first_in_step: int) -> int:
    return derive_seed(root, "fetch", epoch, step_in_epoch, first_in_step)
