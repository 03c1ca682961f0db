"""The tree over shards: the same additions, however the shards are dealt out."""

from __future__ import annotations

from itertools import product

import pytest

from holdfast.training.distributed.gradient_tree import (
    TreeCounter,
    nodes_of,
    shards_of_rank,
    tree_sum,
)


def added(left: str, right: str) -> str:
    return f"({left}+{right})"


def summed(num_shards: int, num_ranks: int, *, are_dealt: bool = False) -> str:
    """The sum as text: its brackets are the order of the additions."""
    parts: dict[tuple[int, int], str] = {}
    for rank in range(num_ranks):
        own = shards_of_rank(num_shards, rank, num_ranks, are_dealt=are_dealt)
        counter = TreeCounter(num_shards, added)
        for shard in own:
            counter.take(shard, str(shard))
        assert [*counter.parts()] == nodes_of(own, num_shards)
        parts |= counter.parts()
    return tree_sum(parts, num_shards, added)


@pytest.mark.parametrize("num_shards", range(1, 34))
def test_the_order_of_sums_depends_on_the_shards_alone(num_shards: int) -> None:
    alone = summed(num_shards, 1)
    for num_ranks in range(2, num_shards + 4):  # more ranks than shards: some have none
        assert summed(num_shards, num_ranks) == alone


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("num_each", [1, 2, 3, 5, 8])
def test_it_is_the_same_where_shards_are_dealt_to_a_power_of_two(
    num_ranks: int, num_each: int
) -> None:
    num_shards = num_ranks * num_each
    alone = summed(num_shards, 1)
    assert summed(num_shards, num_ranks, are_dealt=True) == alone
    passes = TreeCounter(num_each, added)  # each sums a shard of every rank, in its own tree
    for number in range(num_each):
        first = number * num_ranks
        leaves = {(0, rank): str(first + rank) for rank in range(num_ranks)}
        passes.take(number, tree_sum(leaves, num_ranks, added))
    assert [*passes.parts().values()] == [alone]


def test_the_tree_is_balanced_and_its_neighbours_are_added_first() -> None:
    assert summed(4, 3) == "((0+1)+(2+3))"
    assert summed(7, 2) == "(((0+1)+(2+3))+((4+5)+6))"


def test_every_shard_is_some_rank_s() -> None:
    for num_shards, num_ranks in product(range(1, 20), range(1, 20)):
        dealt = [
            s for rank in range(num_ranks) for s in shards_of_rank(num_shards, rank, num_ranks)
        ]
        assert dealt == [*range(num_shards)]
