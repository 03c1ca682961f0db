"""The greedy soup as a rule: what is tried, what is kept, and how it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from holdfast.training.averages.soup import GreedyStep, greedy_soup


def measuring(values: dict[tuple[int, ...], float]) -> Callable[[Sequence[int]], float | None]:
    return lambda steps: values.get(tuple(steps))


VALUES = {(3,): 0.5, (3, 1): 0.4, (3, 1, 2): 0.6, (3, 1, 4): 0.4}
STEPS = [
    GreedyStep(3, 0.5, True),
    GreedyStep(1, 0.4, True),
    GreedyStep(2, 0.6, False),
    GreedyStep(4, 0.4, True),
]


def test_what_does_not_worsen_the_metric_is_kept() -> None:
    assert greedy_soup([3, 1, 2, 4], "min", measuring(VALUES)) == STEPS


def test_large_metrics_may_be_the_good_ones() -> None:
    found = greedy_soup([1, 2, 3], "max", measuring({(1,): 0.5, (1, 2): 0.4, (1, 3): 0.6}))
    assert found is not None
    assert [step.is_kept for step in found] == [True, False, True]


def test_an_average_without_a_finite_metric_is_never_kept() -> None:
    found = greedy_soup([1, 2], "min", measuring({(1,): 0.5, (1, 2): math.nan}))
    assert found == [GreedyStep(1, 0.5, True), GreedyStep(2, None, False)]


@pytest.mark.parametrize("num_known", range(5))
def test_it_goes_on_from_any_trial(num_known: int) -> None:
    told: list[list[GreedyStep]] = []
    measured: list[Sequence[int]] = []

    def measure(steps: Sequence[int]) -> float | None:
        measured.append(steps)
        return VALUES[tuple(steps)]

    found = greedy_soup(
        [3, 1, 2, 4], "min", measure, STEPS[:num_known], lambda steps: told.append([*steps])
    )
    assert found == STEPS
    assert len(measured) == 4 - num_known
    assert told == [STEPS[:number] for number in range(num_known + 1, 5)]


def test_it_stops_when_it_is_told_to() -> None:
    told: list[Sequence[GreedyStep]] = []
    assert greedy_soup([3, 9], "min", measuring(VALUES), (), told.append) is None
    assert len(told) == 1
