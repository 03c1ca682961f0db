"""Sums of rows over the ranks, on their way while something else is done.

A sum is a generator: it yields while an exchange is on its way, and returns the sum at last.
Whoever has several begins them and takes them further in the same order on every rank, so that each
exchange meets its like.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from torch import Tensor

from holdfast.training.distributed.gradient_tree import (
    TreeCounter,
    nodes_of,
    shards_of_rank,
    tree_sum,
)
from holdfast.training.distributed.rows import Memory, Row
from holdfast.training.distributed.world import World

Sum = Generator[None, None, Memory]
PAIRED_TYPES = (torch.float32, torch.float64)
"""Of these gloo's sum of two is torch's; of half precision it need not be."""


class RowSums:
    """Sums over the shards of a step, of all ranks.

    With ``is_in_tree`` the sums are those of one tree over the shards, whatever the number of
    ranks; without, there is one shard a rank, and gloo's own sum. Shards that ``are_dealt`` are
    the ranks' in turn.
    """

    def __init__(self, world: World, *, is_in_tree: bool, are_dealt: bool = False) -> None:
        self._world = world
        self._is_in_tree = is_in_tree
        self._are_dealt = are_dealt

    def can_be_cut(self) -> bool:
        """Whether it is all one to the bits which tensors lie in a row together.

        Gloo's sum of three or more begins with another rank in each part of a row.
        """
        return self._is_in_tree or self._world.size <= 2

    def own(self, row: Row, counter: TreeCounter[Memory]) -> list[Memory]:
        """What this rank gives to the sum of a row: a row for each node, or one of zeros."""
        own = [*counter.parts().values()]
        if not own and not self._is_in_tree:
            own = [row.take()]
            own[0].flat.zero_()
        return own

    def begun(self, row: Row, own: list[Memory], num_shards: int) -> Sum:
        """The sum of a row over all shards, on its way."""
        if self._world.size == 1:
            sum_ = _at_once(own[0])
        elif not self._is_in_tree or self._is_of_two(row, num_shards):
            sum_ = self._all_reduced(own[0])
        else:
            sum_ = self._through_slices(row, own, num_shards)
        next(sum_)
        return sum_

    def _is_of_two(self, row: Row, num_shards: int) -> bool:
        """Whether the tree's root is all that is left: of two operands, whose order is one."""
        nodes = self._nodes(num_shards)
        return [len(own) for own in nodes] == [1, 1] and row.dtype in PAIRED_TYPES

    def _nodes(self, num_shards: int) -> list[list[tuple[int, int]]]:
        size, are_dealt = self._world.size, self._are_dealt
        shards = [shards_of_rank(num_shards, k, size, are_dealt=are_dealt) for k in range(size)]
        return [nodes_of(of_rank, num_shards) for of_rank in shards]

    def _all_reduced(self, memory: Memory) -> Sum:
        wait = self._world.begin_sum(memory.flat)
        yield
        wait()
        return memory

    def _through_slices(self, row: Row, own: list[Memory], num_shards: int) -> Sum:
        """Each rank adds up its slice of all ranks' sums, and the slices are joined."""
        size, width = self._world.size, row.size // self._world.size
        nodes = self._nodes(num_shards)
        flat = _by_slices([part.flat for part in own], size, row)
        lengths = [len(of_rank) * width for of_rank in nodes]
        taken, wait = self._world.begin_exchange(flat, [len(own) * width] * size, lengths)
        yield
        wait()
        every = [node for of_rank in nodes for node in of_rank]
        parts = dict(zip(every, taken.view(len(every), width).unbind(), strict=True))
        slice_ = tree_sum(parts, num_shards, lambda left, right: left.add_(right))
        total = row.take()
        wait = self._world.begin_join(slice_, total.flat)
        yield
        wait()
        for part in own:
            row.give_back(part)
        return total


def finished(sums: Iterable[Sum]) -> list[Memory]:
    """All sums that were begun, taken further in turn."""
    going: dict[int, Sum] = dict(enumerate(sums))
    done: dict[int, Memory] = {}
    while going:
        for number, sum_ in [*going.items()]:
            try:
                next(sum_)
            except StopIteration as end:
                done[number] = end.value
                del going[number]
    return [done[number] for number in sorted(done)]


def _at_once(memory: Memory) -> Sum:
    yield
    return memory


def _by_slices(own: list[Tensor], num_slices: int, row: Row) -> Tensor:
    """Rows, put together so that what one rank gets of all of them lies together."""
    if len(own) == 1:
        return own[0]
    if not own:
        return torch.empty(0, dtype=row.dtype, device=row.device)
    width = row.size // num_slices
    return torch.stack(own).view(len(own), num_slices, width).transpose(0, 1).reshape(-1)
