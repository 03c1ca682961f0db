"""What a loop does to its data set while batches are read."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from tests.training.own_loop.loaders import loader_of


class Numbers:
    """Tells apart what the loop changes from what reading does."""

    def __init__(self) -> None:
        self.level = 0
        self.least = math.nan
        self.num_read = 0
        self.is_open = False

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        self.num_read += 1
        self.is_open = True
        return index + self.level


class Told(Numbers):
    def set_epoch(self, epoch: int) -> None:
        self.level = epoch


def nothing(dataset: Numbers) -> None:
    pass


def raise_level(dataset: Numbers) -> None:
    dataset.level += 1


@pytest.mark.parametrize(
    ("kind", "change", "num_told"),
    [(Numbers, raise_level, 1), (Numbers, nothing, 0), (Told, raise_level, 0)],
)
def test_only_a_change_that_the_loop_makes_is_told_of_and_once(
    kind: type[Numbers],
    change: Callable[[Numbers], None],
    num_told: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader = loader_of(dataset := kind())
    for _ in loader:
        change(dataset)
    loader.close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == num_told
    assert all(f"{kind.__name__}.level changed while batches are read" in text for text in told)
