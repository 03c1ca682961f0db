"""Data sets that can only be read from the front, but know how far they are.

An ``IterableDataset`` with ``state_dict`` and ``load_state_dict``, or whose iterator has them, is
read by one process, item by item. What it says of its state after a batch travels with that batch,
and is kept in the checkpoint of that step: a resume gives it back, and reads on. That is as exact
as the data set's own state is.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset

from holdfast.training.errors import DataFormatError, ExperimentError
from holdfast.training.experiment.protocol import collate

NUM_PREVIEWED = 64
ENDLESS = 2**40
"""Samples of the one pass that a plan sees; the stream begins again by itself."""


@runtime_checkable
class KnowsPlace(Protocol):
    """What can be left and taken up again."""

    def state_dict(self) -> Mapping[str, Any]:
        """Where it stands: plain values and tensors."""
        ...

    def load_state_dict(self, state: Any, /) -> None:
        """Go there; what is iterated next comes from there."""
        ...


@dataclass(frozen=True)
class Carried:
    """A batch, and the stream's state after it."""

    batch: Any
    state: Mapping[str, Any]


class Streamed:
    """An ``IterableDataset`` in the place of a data set with items by index.

    By index it has the first few items, which is what a rehearsal and the calibration of an export
    look at. Training takes ``next_batch`` instead.
    """

    def __init__(self, dataset: Any) -> None:
        self.source = dataset
        self._fresh = _state_of(dataset)
        self._preview: list[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._own = self._fresh  # what it said last; not asked before the first item is read
        self._next, self._num_passes = 0, 0
        if hasattr(dataset, "collate"):
            self.collate = dataset.collate

    def __len__(self) -> int:
        return len(self._previewed())

    def __getitem__(self, index: int) -> Any:
        return self._previewed()[index]

    def go_to(self, position: int, state: Mapping[str, Any] | None) -> None:
        """Read on at a position with the state that was carried to it.

        Without one it is read from its beginning up to there.
        """
        self._iterator = None
        if state is not None:
            if state["position"] != position:
                raise DataFormatError(
                    f"the state of the stream is of sample {state['position']}, and training goes "
                    f"on at {position}: resume from a checkpoint of this run"
                )
            self._next, self._num_passes = position, state["num_passes"]
            self._begin(state["own"])
            return
        self._next = self._num_passes = 0
        self._begin(self._fresh)
        while self._next < position:
            self._item()
            self._own = _state_of(self.source, self._iterator)

    def next_batch(self, indices: npt.NDArray[np.int64]) -> Carried:
        """The items of a place, which must be the next one."""
        if self._iterator is None or self._next != int(indices[0]):
            self.go_to(int(indices[0]), None)
        items = [self._item() for _ in indices]
        self._own = own = _state_of(self.source, self._iterator)
        state = {"position": self._next, "num_passes": self._num_passes, "own": own}
        return Carried(collate(self, items), state)

    def __reduce__(self) -> tuple[Any, ...]:
        """What travels to the loader process: where to read on, and no iterator.

        As plain bytes: torch would send each tensor by a descriptor, and close those of a state
        that nobody else holds, or of a generator, before the process has them.
        """
        is_begun = self._iterator is not None
        return _received, (pickle.dumps(({**self.__dict__, "_iterator": None}, is_begun)),)

    def _begin(self, own: Mapping[str, Any] | None) -> None:
        """Iterate from a state of its own on; None is the beginning of a data set without one."""
        self._own = own
        self._tell_pass()
        knows_place = isinstance(self.source, KnowsPlace)
        if knows_place:
            self.source.load_state_dict(copy.deepcopy(own))
        self._iterator = iterator = iter(self.source)
        if own is not None and not knows_place:
            iterator.load_state_dict(copy.deepcopy(own))

    def _tell_pass(self) -> None:
        if callable(set_epoch := getattr(self.source, "set_epoch", None)):
            set_epoch(self._num_passes)

    def _item(self) -> Any:
        assert self._iterator is not None
        for _ in range(2):
            try:
                item = next(self._iterator)
            except StopIteration:
                self._num_passes += 1
                self._tell_pass()
                self._iterator = iter(self.source)
                continue
            self._next += 1
            return item
        raise DataFormatError(
            f"{type(self.source).__name__} gave no sample when it was read from its beginning again"
        )

    def _previewed(self) -> list[Any]:
        if self._preview is None:
            source = copy.deepcopy(self.source)
            if isinstance(source, KnowsPlace):
                source.load_state_dict(copy.deepcopy(self._fresh))
            self._preview = list(islice(iter(source), NUM_PREVIEWED))
        return self._preview


def _received(content: bytes) -> Streamed:
    attributes, is_begun = pickle.loads(content)  # noqa: S301 - from this process's own parent
    stream = Streamed.__new__(Streamed)
    stream.__dict__.update(attributes)
    if is_begun:
        stream._begin(stream._own)
    return stream


def taken(dataset: Any) -> Any:
    """A data set as training takes it: a stream that knows its place behind ``Streamed``.

    Raises ExperimentError for a stream that does not.
    """
    if not isinstance(dataset, IterableDataset) and not _is_stream(dataset):
        return dataset
    if isinstance(dataset, KnowsPlace) or isinstance(iter(copy.deepcopy(dataset)), KnowsPlace):
        return Streamed(dataset)
    raise ExperimentError(
        f"{type(dataset).__name__} is a stream that does not know how far it is, so a resume could "
        f"not go on where it stopped: give it state_dict() and load_state_dict(state), or take "
        f"stream files (holdfast.StreamFiles) or a data set with __len__ and __getitem__"
    )


def _is_stream(dataset: Any) -> bool:
    """Whether it is a stream of another library, such as ``datasets``."""
    has_items = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return not has_items and hasattr(dataset, "__iter__") and isinstance(dataset, KnowsPlace)


def _state_of(source: Any, iterator: Any = None) -> Any:
    """The state of the data set, or of its iterator where that has one; a copy."""
    for part in (source, iterator):
        if isinstance(part, KnowsPlace):
            return copy.deepcopy(part.state_dict())
    return None
