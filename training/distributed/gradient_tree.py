"""Sums over the shards of a step in one fixed balanced binary tree.

The tree stands over the numbers of the shards alone: neighbours are added, then neighbouring sums,
and one that has no neighbour goes up as it is. Each rank adds what lies whole within its own
shards, the ranks exchange these partial sums, and add the rest. So every addition has the same two
operands, whichever rank does it, and the bits do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

Node = tuple[int, int]
"""Level and number: the sum of shards ``number << level`` up to ``(number + 1) << level``."""
Value = TypeVar("Value")
Add = Callable[[Value, Value], Value]
"""The sum of a left and a right part."""


def shards_of_rank(num_shards: int, rank: int, num_ranks: int, *, are_dealt: bool = False) -> range:
    """The shards that a rank computes: consecutive ones, nearly as many for each.

    Where they ``are_dealt``, in turn: then a rank has no two that are added to each other first.
    """
    if are_dealt:
        return range(rank, num_shards, num_ranks)
    return range(num_shards * rank // num_ranks, num_shards * (rank + 1) // num_ranks)


def nodes_of(shards: range, num_shards: int) -> list[Node]:
    """The fewest nodes of the tree that hold exactly these shards, in their order.

    Shards that are dealt must be an even number of ranks' parts of all.
    """
    if shards.step > 1:
        each = (nodes_of(range(shard, shard + 1), num_shards) for shard in shards)
        return [node for nodes in each for node in nodes]
    nodes = []
    first = shards.start
    while first < shards.stop:
        level = 0
        while _is_within(first, level + 1, shards.stop, num_shards):
            level += 1
        nodes.append((level, first >> level))
        first += 1 << level
    return nodes


def tree_sum(parts: Mapping[Node, Value], num_shards: int, add: Add[Value]) -> Value:
    """The sum of the whole tree from nodes that together hold each shard once."""

    def total(level: int, number: int) -> Value:
        found = parts.get((level, number))
        if found is not None:
            return found
        left, right = total(level - 1, 2 * number), 2 * number + 1
        if right << (level - 1) >= num_shards:
            return left
        return add(left, total(level - 1, right))

    return total((num_shards - 1).bit_length(), 0)


class TreeCounter(Generic[Value]):
    """Adds shards that come one after the other; keeps as few partial sums as there can be."""

    def __init__(self, num_shards: int, add: Add[Value]) -> None:
        self._num_shards = num_shards
        self._add = add
        self._waiting: list[tuple[int, int, Value]] = []

    def take(self, shard: int, value: Value) -> None:
        """Add the next shard, one more than the one before."""
        level, number = 0, shard
        while 1 << level < self._num_shards:
            if number % 2 == 0:
                if (number + 1) << level < self._num_shards:
                    break  # its neighbour is still to come
            elif self._waiting and self._waiting[-1][:2] == (level, number - 1):
                value = self._add(self._waiting.pop()[2], value)
            else:
                break  # its neighbour is another rank's
            level, number = level + 1, number // 2
        self._waiting.append((level, number, value))

    def parts(self) -> dict[Node, Value]:
        """The partial sums, in the order of the shards."""
        return {(level, number): value for level, number, value in self._waiting}


def _is_within(first: int, level: int, stop: int, num_shards: int) -> bool:
    """Whether the node of this level that begins with shard ``first`` is one, and ends in time."""
    is_aligned = first % (1 << level) == 0
    is_in_tree = 1 << (level - 1) < num_shards
    return is_aligned and is_in_tree and min(first + (1 << level), num_shards) <= stop
