"""Which samples make which step."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.data.batch_plan import (
    BLOCK_SIZE,
    BatchPlan,
    FixedSizePlan,
    OwnOrderPlan,
    TokenPlan,
    place_of,
)
from holdfast.training.errors import InputError


def epoch_of(plan: BatchPlan, epoch: int) -> list[list[int]]:
    return [plan.indices(epoch, step).tolist() for step in range(plan.num_steps(epoch))]


@given(
    n=st.integers(1, 3 * BLOCK_SIZE),
    batch_size=st.integers(1, 3000),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_visits_each_sample_once(n: int, batch_size: int, epoch: int) -> None:
    batches = epoch_of(FixedSizePlan(n, batch_size, False, 0), epoch)
    assert sorted(chain.from_iterable(batches)) == list(range(n))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_dropping_the_last_batch_leaves_the_others_as_they_are() -> None:
    kept = epoch_of(FixedSizePlan(103, 10, False, 5), 2)
    assert epoch_of(FixedSizePlan(103, 10, True, 5), 2) == kept[:-1]


def test_a_step_is_the_same_wherever_a_process_began() -> None:
    plan = FixedSizePlan(10 * BLOCK_SIZE, 48, False, 9)
    expected = {(e, s): plan.indices(e, s).tolist() for e in (0, 1) for s in range(400)}
    order = np.random.RandomState(0).permutation(len(expected))
    for number in order[:100]:
        place = list(expected)[number]
        assert plan.indices(*place).tolist() == expected[place]
        assert (
            FixedSizePlan(10 * BLOCK_SIZE, 48, False, 9).indices(*place).tolist()
            == (expected[place])
        )


def test_epochs_and_seeds_have_different_orders() -> None:
    plan = FixedSizePlan(1000, 1000, False, 0)
    orders = [plan.indices(epoch, 0).tolist() for epoch in range(5)]
    orders.append(FixedSizePlan(1000, 1000, False, 1).indices(0, 0).tolist())
    assert len({tuple(order) for order in orders}) == 6


def test_a_step_outside_of_the_epoch_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="step 4 is not in an epoch of 4"):
        FixedSizePlan(10, 3, False, 0).indices(0, 4)


def test_plans_without_a_batch_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        FixedSizePlan(0, 3, False, 0)
    with pytest.raises(InputError, match=r"2 samples are fewer than data\.batch_size=3"):
        FixedSizePlan(2, 3, True, 0)
    with pytest.raises(InputError, match="empty"):
        TokenPlan([], 3, 0)


lengths_lists = st.lists(st.integers(0, 50), min_size=1, max_size=300)


@given(lengths=lengths_lists, batch_tokens=st.integers(50, 400), seed=st.integers(0, 100))
def test_token_batches_hold_each_item_once_and_not_too_many_tokens(
    lengths: list[int], batch_tokens: int, seed: int
) -> None:
    batches = epoch_of(TokenPlan(lengths, batch_tokens, seed), 3)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    assert all(len(b) * max(lengths[i] for i in b) <= batch_tokens for b in batches)


def test_token_batches_hold_similar_lengths_and_little_padding() -> None:
    lengths = np.random.RandomState(0).geometric(0.05, 5000).clip(1, 100).tolist()
    batches = epoch_of(TokenPlan(lengths, 1000, 0), 0)
    num_padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert sum(lengths) / num_padded > 0.98
    assert np.mean([len(b) * max(lengths[i] for i in b) for b in batches]) > 950


def test_token_batches_are_visited_in_another_order_in_each_epoch() -> None:
    plan = TokenPlan(list(range(1, 200)), 400, 0)
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    assert first != second
    assert sorted(first) == sorted(second)


def test_the_seed_decides_which_items_of_one_length_stand_together() -> None:
    one, other = (epoch_of(TokenPlan([5] * 100, 50, seed), 0) for seed in (0, 1))
    assert {frozenset(b) for b in one} != {frozenset(b) for b in other}


def test_an_item_longer_than_a_batch_is_named() -> None:
    with pytest.raises(InputError, match=r"item 1 has 9 tokens, more than data\.batch_tokens=8"):
        TokenPlan([3, 9, 4], 8, 0)


def test_a_place_is_found_over_passes_of_different_lengths() -> None:
    plan = OwnOrderPlan(lambda epoch: np.arange(4 + 3 * (epoch % 2)), 2, False)
    walked = [(epoch, step) for epoch in range(5) for step in range(plan.num_steps(epoch))]
    assert [place_of(plan, step) for step in range(len(walked))] == walked
