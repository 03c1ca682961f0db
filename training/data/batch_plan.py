"""Which samples make which step: pure functions of (seed, epoch, step in the epoch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from holdfast.training.data.permutation import Int64Array, Permutation
from holdfast.training.errors import InputError
from holdfast.training.exactness.seeding import derive_seed

BLOCK_SIZE = 2048
OrderOfPositions = Callable[[Int64Array], Int64Array]
"""The samples that stand at ascending positions of an epoch."""


class BatchPlan(Protocol):
    """The batches of every epoch. The place in an epoch is the number of the step."""

    def num_steps(self, epoch: int) -> int:
        """Steps of an epoch, at least one."""
        ...

    def indices(self, epoch: int, step_in_epoch: int) -> Int64Array:
        """Indices of the samples of a step, at least one; the caller must not write to them."""
        ...


def place_of(plan: BatchPlan, step: int) -> tuple[int, int]:
    """The pass over the data, and the step in it, that come after so many steps of a run."""
    current = 0
    while step >= (num_steps := plan.num_steps(current)):
        current, step = current + 1, step - num_steps
    return current, step


class FixedSizePlan:
    """Batches of one size in an order that differs in each epoch.

    The last batch of an epoch is smaller, or dropped. Memory and the time of a call do not
    depend on ``n``: the order is computed for a block of positions around the place asked for.
    ``permuted`` gives an epoch's order from its key, in the place of a ``Permutation`` of all.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        should_drop_last: bool,
        seed: int,
        permuted: Callable[[int], OrderOfPositions] | None = None,
    ) -> None:
        if n < 1:
            raise InputError("the training data set is empty; expected at least one sample")
        self._n, self._batch_size, self._seed = n, batch_size, seed
        self._num_steps = n // batch_size if should_drop_last else -(-n // batch_size)
        if self._num_steps == 0:
            raise InputError(
                f"data.should_drop_last drops the only batch: {n} samples are fewer than "
                f"data.batch_size={batch_size}"
            )
        self._steps_per_block = max(1, BLOCK_SIZE // batch_size)
        self._permuted = permuted or partial(Permutation, n)
        self._order: OrderOfPositions | None = None
        self._epoch = self._block_number = -1
        self._block: Int64Array = np.empty(0, dtype=np.int64)

    def num_steps(self, epoch: int) -> int:  # noqa: ARG002  # the same for every epoch
        """Steps of an epoch."""
        return self._num_steps

    def indices(self, epoch: int, step_in_epoch: int) -> Int64Array:
        """Indices of the samples of a step. Raises IndexError outside of the epoch."""
        _check_step(step_in_epoch, self._num_steps)
        block_number, step_in_block = divmod(step_in_epoch, self._steps_per_block)
        if (epoch, block_number) != (self._epoch, self._block_number):
            self._compute_block(epoch, block_number)
        first = step_in_block * self._batch_size
        return self._block[first : first + self._batch_size]

    def _compute_block(self, epoch: int, block_number: int) -> None:
        if self._order is None or epoch != self._epoch:
            self._order = self._permuted(derive_seed(self._seed, "order", epoch))
        size = self._steps_per_block * self._batch_size
        first = block_number * size
        self._block = self._order(np.arange(first, min(first + size, self._n), dtype=np.int64))
        self._epoch, self._block_number = epoch, block_number


class OwnOrderPlan:
    """Batches of one size in an order that is given, of any length in each epoch.

    The last batch of an epoch is smaller, or dropped. ``order(epoch)`` must give the same each time
    it is asked; memory is that of the longest epoch. Raises InputError where an epoch has no batch.
    """

    def __init__(
        self, order: Callable[[int], Int64Array], batch_size: int, should_drop_last: bool
    ) -> None:
        self._order, self._batch_size = order, batch_size
        self._should_drop_last = should_drop_last
        self._nums_of_steps: dict[int, int] = {}
        self._epoch = -1
        self._indices: Int64Array = np.empty(0, dtype=np.int64)

    def num_steps(self, epoch: int) -> int:
        """Steps of an epoch."""
        if epoch not in self._nums_of_steps:
            self._count(epoch, self._order(epoch))
        return self._nums_of_steps[epoch]

    def indices(self, epoch: int, step_in_epoch: int) -> Int64Array:
        """Indices of the samples of a step. Raises IndexError outside of the epoch."""
        if epoch != self._epoch:
            self._indices = self._order(epoch)
            self._count(epoch, self._indices)
            self._epoch = epoch
        _check_step(step_in_epoch, self._nums_of_steps[epoch])
        first = step_in_epoch * self._batch_size
        return self._indices[first : first + self._batch_size]

    def _count(self, epoch: int, indices: Int64Array) -> None:
        num, size = len(indices), self._batch_size
        num_steps = num // size if self._should_drop_last else -(-num // size)
        if num_steps == 0:
            raise InputError(
                f"data.should_drop_last drops the only batch of epoch {epoch}: its {num} samples "
                f"are fewer than data.batch_size={size}"
            )
        self._nums_of_steps[epoch] = num_steps


class TokenPlan:
    """Batches of items of similar length, each with at most ``batch_tokens`` padded tokens.

    The batches are formed once, from the lengths and the seed (which orders items of equal
    length), and visited in another order in each epoch. So the place in an epoch is the number of
    the step, and a resume costs nothing but forming the batches: one sort. Padded tokens are the
    number of items times the longest length among them. Raises InputError for an item that alone
    is longer than ``batch_tokens``.
    """

    def __init__(self, lengths: Sequence[int], batch_tokens: int, seed: int) -> None:
        lengths_N = np.asarray(lengths, dtype=np.int64)
        if lengths_N.size == 0:
            raise InputError("the training data set is empty; expected at least one sample")
        longest = int(lengths_N.argmax())
        if lengths_N[longest] > batch_tokens:
            raise InputError(
                f"item {longest} has {lengths_N[longest]} tokens, more than "
                f"data.batch_tokens={batch_tokens}; raise it, or leave such items out"
            )
        shuffled = Permutation(lengths_N.size, derive_seed(seed, "ties"))(np.arange(lengths_N.size))
        self._items = shuffled[np.argsort(lengths_N[shuffled], kind="stable")]
        self._starts = _cut(np.maximum(lengths_N[self._items], 1), batch_tokens)
        self._order = FixedSizePlan(self._starts.size - 1, 1, False, seed)

    def num_steps(self, epoch: int) -> int:  # noqa: ARG002  # the same for every epoch
        """Steps of an epoch."""
        return int(self._starts.size) - 1

    def indices(self, epoch: int, step_in_epoch: int) -> Int64Array:
        """Indices of the samples of a step, by length. Raises IndexError outside of the epoch."""
        batch = int(self._order.indices(epoch, step_in_epoch)[0])
        return self._items[self._starts[batch] : self._starts[batch + 1]]


def _cut(ascending: Int64Array, batch_tokens: int) -> Int64Array:
    """Where batches start, and the end: each as large as its longest, last item lets it be."""
    starts = [0]
    while starts[-1] < ascending.size:
        first = starts[-1]
        candidates = ascending[first : first + batch_tokens // int(ascending[first])]
        padded = candidates * np.arange(1, candidates.size + 1)
        starts.append(first + int(np.count_nonzero(padded <= batch_tokens)))
    return np.array(starts, dtype=np.int64)


def _check_step(step_in_epoch: int, num_steps: int) -> None:
    if not 0 <= step_in_epoch < num_steps:
        raise IndexError(f"step {step_in_epoch} is not in an epoch of {num_steps} steps")
