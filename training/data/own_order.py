"""The order of an epoch where the data set gives it: sequential, weighted, curriculum."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.training.data.batch_plan import OrderOfPositions
from holdfast.training.data.permutation import Int64Array
from holdfast.training.errors import InputError
from holdfast.training.exactness.seeding import IsolatedGenerators, derive_seed
from holdfast.training.experiment.error_places import described
from holdfast.training.experiment.protocol import Dataset

Order = Callable[[int], Int64Array]
"""Indices of the samples of an epoch, at least one."""
METHODS = ("order", "weights")


def own_order(dataset: Dataset, seed: int) -> Order | None:
    """The order of the data set's own ``order`` or ``weights``; None where it has neither.

    An attribute of that name that is no function of one argument is something else, and stays so.
    Raises InputError where the data set has both, or gives no order of the first epoch, or another
    one when it is asked again.
    """
    found = [name for name in METHODS if _is_of_epoch(getattr(dataset, name, None))]
    if len(found) == 2:
        raise InputError(
            f"{type(dataset).__name__} has order(epoch) and weights(epoch), and an epoch has one "
            f"order: leave one of them out"
        )
    if not found:
        return None
    own = _Own(dataset, found[0], seed)
    order = own.order if found == ["order"] else own.drawn
    if not np.array_equal(order(0), order(0)):
        raise InputError(
            f"{type(dataset).__name__}.{found[0]}(0) gave something else when it was asked again; "
            f"it must be a function of the epoch alone: draw from random, NumPy's global generator "
            f"or torch, which are seeded by the epoch"
        )
    return order


def own_permutation(dataset: Dataset) -> Callable[[int], OrderOfPositions] | None:
    """The data set's own ``permutation_by_key``; None where it has none."""
    found = getattr(dataset, "permutation_by_key", None)
    return found if _is_of_epoch(found) else None


def _is_of_epoch(value: object) -> bool:
    """Whether it is a function that can be called with one argument."""
    if not callable(value):
        return False
    try:
        inspect.signature(value).bind(0)
    except (TypeError, ValueError):
        return False
    return True


class _Own:
    """Asks a data set, and checks what it says."""

    def __init__(self, dataset: Dataset, name: str, seed: int) -> None:
        self._method: Callable[[int], Any] = getattr(dataset, name)
        self._name = f"{type(dataset).__name__}.{name}"
        self._num_samples = len(dataset)
        self._seed = seed
        self._generators = IsolatedGenerators()

    def order(self, epoch: int) -> Int64Array:
        """The indices that the data set gives. Raises InputError where they are none."""
        found = self._asked(epoch)
        told = f"{self._name}({epoch}) must give at least one index of a sample, from 0 to "
        told += f"{self._num_samples - 1}"
        if found.ndim != 1 or found.dtype.kind not in "iu" or not found.size:
            raise InputError(f"{told}; it gave {found.dtype} of shape {list(found.shape)}")
        outside = (found < 0) | (found >= self._num_samples)
        if outside.any():
            raise InputError(f"{told}; it gave {found[outside][0]}")
        return found.astype(np.int64)

    def drawn(self, epoch: int) -> Int64Array:
        """As many indices as there are samples, drawn with replacement by the weights."""
        ends = np.cumsum(self._weights(epoch))
        draws = np.random.RandomState(np.random.MT19937(derive_seed(self._seed, "weighted", epoch)))
        # Of equal ends the first one is the sample with a weight, also for a draw at the very end.
        places = draws.random_sample(self._num_samples) * ends[-1]
        found = np.searchsorted(ends, places, side="right")
        last = np.searchsorted(ends, ends[-1], side="left")
        drawn: Int64Array = np.minimum(found, last).astype(np.int64)
        return drawn

    def _weights(self, epoch: int) -> npt.NDArray[np.float64]:
        found = self._asked(epoch)
        told = f"{self._name}({epoch}) must give {self._num_samples} weights that are not negative"
        if found.shape != (self._num_samples,) or found.dtype.kind not in "iuf":
            raise InputError(f"{told}; it gave {found.dtype} of shape {list(found.shape)}")
        weights = found.astype(np.float64)
        total = weights.sum()
        if not (weights >= 0).all() or not 0 < total < np.inf:
            raise InputError(f"{told}, and one above 0; the least is {weights.min()}, sum {total}")
        return weights

    def _asked(self, epoch: int) -> npt.NDArray[Any]:
        seed = derive_seed(self._seed, "own order", epoch)
        try:
            return np.asarray(self._generators.run(seed, self._method, epoch))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self._name}({epoch}) failed: {described(error)}") from error
