"""Some batches before their turn, where the process that trains fetches them itself.

A step empties the caches of a processor. What is short to fetch is then fetched by code and data
that have to come from memory again: a third of its time is saved where several are fetched in a
row. What a batch holds depends on its place alone, so that it does not matter when it is fetched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.training.data.fetching import Place
from holdfast.training.errors import HoldfastError
from holdfast.training.experiment.nests import leaves

AHEAD_S = 0.005
"""For how long a step may wait for batches of later ones: a notice is heard after it."""


class FetchedAhead:
    """Gives the batches of places one by one, and fetches as many in a row as are quickly there.

    An error is raised when the turn of its place has come. Batches that have memory in common, as
    of a data set that fills one buffer again and again, are fetched one at a time from then on.
    """

    def __init__(self, fetch: Callable[[Place], Any], *, is_ahead: bool) -> None:
        """``fetch`` gives the same batch of a place each time. With ``is_ahead`` some are early."""
        self._fetch = fetch
        self._is_ahead = is_ahead

    def batches(self, places: Sequence[Place]) -> Iterator[tuple[Place, Any]]:
        """The batches of places, in their order. Raises what ``fetch`` raises."""
        number = 0
        while number < len(places):
            row = self._row(places[number:])
            yield from zip(places[number:], row, strict=False)
            number += len(row)

    def _row(self, places: Sequence[Place]) -> list[Any]:
        end_s = time.monotonic() + AHEAD_S
        row = [self._fetch(places[0])]
        known = _memory(row[0]) if self._is_ahead else None
        for place in places[1:]:
            if known is None or time.monotonic() > end_s:
                break
            try:
                batch = self._fetch(place)
            except HoldfastError:
                break
            memory = _memory(batch)
            if memory is None or memory & known:
                self._is_ahead = False
                return [self._fetch(places[0])]
            row.append(batch)
            known |= memory
        return row


def _memory(batch: Any) -> set[int] | None:
    """Where the tensors of a batch lie; None where it may hold what is not known."""
    found = set()
    for _, leaf in leaves(batch):
        if type(leaf) is Tensor and leaf.layout == torch.strided:
            found.add(leaf.untyped_storage().data_ptr())
        elif leaf is not None and not isinstance(leaf, (bool, int, float, str)):
            return None
    return found
