"""The keyed permutation: a bijection for any n, and as good as a shuffle."""

from __future__ import annotations

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.training.data.permutation import TABLE_SIZE, Permutation
from holdfast.training.errors import InputError

keys = st.integers(min_value=0, max_value=2**63 - 1)


def order_of(n: int, key: int) -> np.ndarray:
    return Permutation(n, key)(np.arange(n))


@given(st.integers(min_value=1, max_value=20_000), keys)
@example(1, 0)
@example(TABLE_SIZE, 0)
@example(TABLE_SIZE + 1, 0)
@example(65**2, 1)  # a square: no cycle walking
@example(65**2 + 1, 1)
def test_every_element_stands_at_exactly_one_position(n: int, key: int) -> None:
    assert np.array_equal(np.sort(order_of(n, key)), np.arange(n))


@given(st.integers(min_value=1, max_value=2**62), keys, st.data())
def test_any_place_of_any_size_is_computed_by_itself(n: int, key: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    permutation = Permutation(n, key)
    together = permutation(np.array(positions))
    assert [int(permutation(np.array([p]))[0]) for p in positions] == together.tolist()
    assert ((together >= 0) & (together < n)).all()
    assert len(set(together.tolist())) == len(set(positions))


@pytest.mark.parametrize("n", [1000, 10_007])
def test_keys_give_unrelated_orders(n: int) -> None:
    orders = [order_of(n, key) for key in range(20)]
    num_same = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    # The number of agreements of two shuffles is Poisson distributed with mean 1.
    assert 0.7 < np.mean(num_same) < 1.3
    assert max(num_same) < 9


def test_all_orders_of_four_are_equally_likely() -> None:
    counts = dict.fromkeys(permutations(range(4)), 0)
    for key in range(4800):
        counts[tuple(order_of(4, key).tolist())] += 1
    # chi-square with 23 degrees of freedom: 49.7 is exceeded once in a thousand
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7


@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_small_permutations_put_each_element_everywhere_equally_often(n: int) -> None:
    num_keys = 3000
    table = np.zeros((n, n))
    for key in range(num_keys):
        table[np.arange(n), order_of(n, key)] += 1
    expected = num_keys / n
    # Rows and columns of a permutation's table are tied: hence the factor.
    chi_square = ((table - expected) ** 2 / expected).sum() * (n - 1) / n
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [TABLE_SIZE + 1, 100_003])
def test_large_permutations_spread_each_position_and_its_neighbour_evenly(n: int) -> None:
    num_cells, num_keys = 8, 1500
    pairs = np.zeros((num_cells, num_cells))
    for key in range(num_keys):
        first, second = Permutation(n, key)(np.array([n // 3, n // 3 + 1])) * num_cells // n
        pairs[first, second] += 1
    expected = num_keys / num_cells**2
    chi_square = ((pairs - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 4 * np.sqrt(2 * 63)


@pytest.mark.parametrize("n", [TABLE_SIZE, 50_000])
def test_one_order_has_no_serial_correlation_and_a_shuffles_fixed_points(n: int) -> None:
    orders = [order_of(n, key) for key in range(20)]
    correlations = [np.corrcoef(order[:-1], order[1:])[0, 1] for order in orders]
    assert np.abs(correlations).max() < 4 / np.sqrt(n)
    assert 0.3 < np.mean([(order == np.arange(n)).sum() for order in orders]) < 2.0
    num_ascents = [(np.diff(order) > 0).sum() for order in orders]
    assert np.abs(np.array(num_ascents) - n / 2).max() < 4 * np.sqrt(n / 12)


def test_memory_does_not_grow_with_n() -> None:
    tracemalloc.start()
    try:
        Permutation(10**15, 0)(np.arange(9 * 10**14, 9 * 10**14 + 1024))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 500_000


def test_orders_never_change_between_versions() -> None:
    assert order_of(8, 1).tolist() == [7, 5, 1, 3, 2, 0, 4, 6]
    assert Permutation(10**9, 1)(np.arange(4)).tolist() == [
        175552581,
        609413968,
        621404289,
        409038759,
    ]


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside_is_refused(position: int) -> None:
    with pytest.raises(InputError, match=rf"0\.\.4, found {position}"):
        Permutation(5, 0)(np.array([position]))


@pytest.mark.parametrize("n", [0, 2**62 + 1])
def test_a_size_outside_is_refused(n: int) -> None:
    with pytest.raises(InputError, match=str(n)):
        Permutation(n, 0)
