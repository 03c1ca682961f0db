"""The order of an epoch of stream files: by files, and within windows, position by position."""

from __future__ import annotations

import numpy as np

from holdfast.training.data.permutation import Int64Array, Permutation
from holdfast.training.exactness.seeding import derive_seed


class WindowedOrder:
    """A keyed bijection on the samples of some files that keeps those of a file together.

    The files come in a keyed order, their samples one after the other; each ``window`` of the
    samples that follow one another is shuffled in itself. So a window needs the few files that it
    lies in, and any position costs the same: one search among the files, one shuffled window.

    Args:
        counts: samples of each file; files without samples are never visited.
        key: of this epoch.
        window: samples that are shuffled together, at least one.
    """

    def __init__(self, counts: Int64Array, key: int, window: int) -> None:
        self._files = Permutation(len(counts), key)(np.arange(len(counts)))
        self._first = np.concatenate(([0], np.cumsum(counts)))[:-1]
        self._ends = np.cumsum(counts[self._files])
        self._key, self._window = key, window
        self._shuffled: tuple[int, Int64Array] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __call__(self, positions: Int64Array) -> Int64Array:
        """The numbers of the samples that stand at ``positions``."""
        windows, places = positions // self._window, np.empty_like(positions)
        for number in np.unique(windows).tolist():
            is_there = windows == number
            places[is_there] = self._of_window(number)[positions[is_there] % self._window]
        ranks = np.searchsorted(self._ends, places, side="right")
        files = self._files[ranks]
        before = np.where(ranks > 0, self._ends[ranks - 1], 0)
        samples: Int64Array = self._first[files] + places - before
        return samples

    def _of_window(self, number: int) -> Int64Array:
        """The places along the files that the positions of a window stand for."""
        if self._shuffled[0] != number:
            first = number * self._window
            size = min(self._window, len(self) - first)
            shuffled = Permutation(size, derive_seed(self._key, "window", number))
            self._shuffled = (number, first + shuffled(np.arange(size)))
        return self._shuffled[1]
