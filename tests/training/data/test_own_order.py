"""Orders that a data set gives: what they may be, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.data.batch_plan import OwnOrderPlan
from holdfast.training.data.own_order import own_order
from holdfast.training.errors import InputError
from holdfast.training.exactness.seeding import capture_generators

NUM = 10


class Data:
    """Ten samples, with what is given as attributes."""

    def __init__(self, **methods: Any) -> None:
        self.__dict__.update(methods)

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> int:
        return index


def order_of(**methods: Any) -> Any:
    return own_order(Data(**methods), 3)


@pytest.mark.parametrize(
    "methods",
    [
        {},
        {"order": torch.arange(NUM)},
        {"weights": [1.0] * NUM},
        {"order": "name"},
        {"order": lambda: [0]},
        {"weights": lambda _one, _other: [0]},
    ],
)
def test_what_is_no_function_of_an_epoch_is_something_else(methods: Any) -> None:
    assert order_of(**methods) is None


@pytest.mark.parametrize(
    "given",
    [[3, 1, 1], range(4), torch.tensor([7]), np.array([0, 9], dtype=np.uint8)],
)
def test_indices_may_be_of_any_kind_and_number(given: Any) -> None:
    found = order_of(order=lambda _: given)(5)
    assert found.dtype == np.int64
    assert found.tolist() == list(map(int, given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "it gave float64 of shape [0]"),
        ([1.0], "it gave float64 of shape [1]"),
        ([[1]], "it gave int64 of shape [1, 1]"),
        ([True], "it gave bool of shape [1]"),
        ([3, NUM], "from 0 to 9; it gave 10"),
        ([-1], "from 0 to 9; it gave -1"),
        (["a"], "it gave <U1"),
    ],
)
def test_what_is_no_order_is_told_in_one_line(given: Any, told: str) -> None:
    with pytest.raises(InputError) as caught:
        order_of(order=lambda epoch: given if epoch else [0])(2)
    assert str(caught.value).startswith("Data.order(2) must give at least one index of a sample")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([1.0] * 9, "must give 10 weights that are not negative; it gave float64 of shape [9]"),
        ([0.0] * NUM, "and one above 0"),
        ([-1.0] + [1.0] * 9, "the least is -1.0"),
        ([float("nan")] + [1.0] * 9, "and one above 0"),
        ([float("inf")] + [1.0] * 9, "sum inf"),
    ],
)
def test_what_are_no_weights_is_told_in_one_line(given: Any, told: str) -> None:
    with pytest.raises(InputError) as caught:
        order_of(weights=lambda _: given)
    assert told in str(caught.value)


def test_both_are_one_too_many() -> None:
    with pytest.raises(InputError, match="leave one of them out"):
        order_of(order=lambda _: [0], weights=lambda _: [1.0] * NUM)


def test_an_order_that_is_another_one_when_it_is_asked_again_is_refused() -> None:
    own = np.random.default_rng(0)
    with pytest.raises(InputError, match=r"Data.order\(0\) gave something else"):
        order_of(order=lambda _: own.permutation(NUM))


def test_an_order_that_fails_is_told_with_its_place() -> None:
    def order(epoch: int) -> Any:
        raise KeyError("easy")

    with pytest.raises(InputError, match=rf"Data.order\(0\) failed: KeyError.*{__name__[-8:]}"):
        order_of(order=order)


def test_draws_are_seeded_by_the_epoch_and_disturb_nobody() -> None:
    def order(epoch: int) -> Any:
        return [random.randrange(NUM), np.random.randint(NUM), int(torch.randint(NUM, ()))] * 5

    first = order_of(order=order)
    before = capture_generators()
    orders = [first(epoch).tolist() for epoch in range(6)]
    assert len(set(map(tuple, orders))) > 3
    after = capture_generators()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert orders[4] == order_of(order=order)(4).tolist()
    assert orders[4] != own_order(Data(order=order), 4)(4).tolist()  # type: ignore[misc]


def test_weighted_draws_follow_the_weights_and_the_epoch() -> None:
    weights = [0.0, 1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    order = order_of(weights=lambda _: weights)
    drawn = [order(epoch) for epoch in range(400)]
    assert all(len(one) == NUM for one in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=NUM)
    assert counts.sum() == counts[1] + counts[3] == 4000
    assert 0.72 < counts[3] / 4000 < 0.78
    assert not np.array_equal(drawn[0], drawn[1])


@given(st.lists(st.floats(0, 1e300), min_size=NUM, max_size=NUM).filter(any))
def test_a_sample_without_a_weight_is_never_drawn(weights: list[float]) -> None:
    drawn = order_of(weights=lambda _: weights)(0)
    assert all(weights[index] > 0 for index in drawn)


@pytest.mark.parametrize(("should_drop_last", "nums"), [(False, [1, 2, 2]), (True, [1, 1, 2])])
def test_an_epoch_has_as_many_steps_as_its_order(should_drop_last: bool, nums: list[int]) -> None:
    plan = OwnOrderPlan(lambda epoch: np.arange(4 + 2 * epoch), 4, should_drop_last)
    assert [plan.num_steps(epoch) for epoch in range(3)] == nums
    assert plan.indices(1, 0).tolist() == [0, 1, 2, 3]
    assert plan.indices(2, 1).tolist() == [4, 5, 6, 7]
    with pytest.raises(IndexError, match="step 2 is not in an epoch of 2"):
        plan.indices(2, 2)


def test_an_epoch_without_a_whole_batch_is_refused_where_it_is_dropped() -> None:
    plan = OwnOrderPlan(lambda _: np.arange(3), 4, True)
    with pytest.raises(InputError, match=r"only batch of epoch 2: its 3 samples are fewer"):
        plan.num_steps(2)
