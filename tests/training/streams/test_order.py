from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.streams.order import WindowedOrder

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(COUNTS, st.integers(0, 2**60), st.integers(1, 50), st.integers(1, 17))
def test_every_sample_has_one_position_from_wherever_it_is_asked(
    counts: list[int], key: int, window: int, step: int
) -> None:
    order = WindowedOrder(np.array(counts), key, window)
    num = sum(counts)
    whole = order(np.arange(num))
    assert sorted(whole.tolist()) == list(range(num))
    fresh = [
        WindowedOrder(np.array(counts), key, window)(np.arange(first, min(first + step, num)))
        for first in range(0, num, step)
    ]
    assert np.array_equal(np.concatenate(fresh), whole)


def test_a_window_needs_the_files_that_it_lies_in_and_no_others() -> None:
    counts = np.full(1000, 100)
    order = WindowedOrder(counts, 7, 400)
    files = [set((order(np.arange(first, first + 400)) // 100).tolist()) for first in (0, 80_000)]
    assert [len(found) for found in files] == [4, 4]
    assert not files[0] & files[1]


def test_another_key_is_another_order_of_files_and_of_samples() -> None:
    counts = np.full(50, 20)
    one, other = (WindowedOrder(counts, key, 100)(np.arange(1000)) for key in (1, 2))
    assert (one == other).mean() < 0.1
    assert (np.diff(one[:100]) == 1).mean() < 0.1
