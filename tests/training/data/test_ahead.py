"""Batches that are fetched before their turn: the same ones, and nothing happens too early."""

from __future__ import annotations

import random
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.training.data import ahead
from holdfast.training.data.loader import FixedSizePlan, Loader
from holdfast.training.errors import LoaderError

NUM_ITEMS, BATCH_SIZE, STEPS_OF_EPOCH = 50, 4, 12


class Drawn:
    """Items that draw from all generators, and a record of what was asked for."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __len__(self) -> int:
        return NUM_ITEMS

    def fetch(self, indices: list[int]) -> Any:
        self.told.append(indices)
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
        return {"items": torch.tensor(indices), "drawn": torch.tensor(drawn)}


class Curriculum(Drawn):
    def set_epoch(self, epoch: int) -> None:
        self.told.append(("epoch", epoch))


class OneBuffer(Drawn):
    """Fills the same memory for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = torch.zeros(BATCH_SIZE, dtype=torch.int64)

    def fetch(self, indices: list[int]) -> Any:
        self.told.append(indices)
        return (self._buffer.copy_(torch.tensor(indices)),)


class OneArray(OneBuffer):
    """As that, in memory of NumPy's."""

    def fetch(self, indices: list[int]) -> Any:
        return [super().fetch(indices)[0].numpy()]


class Slow(Drawn):
    def fetch(self, indices: list[int]) -> Any:
        time.sleep(2 * ahead.AHEAD_S)
        return super().fetch(indices)


class Broken(Drawn):
    def __init__(self, broken: int) -> None:
        super().__init__()
        self._broken = broken

    def fetch(self, indices: list[int]) -> Any:
        if self._broken in indices:
            raise OSError("the disk is gone")
        return super().fetch(indices)


def loader_of(dataset: Drawn, *, is_ahead: bool = True) -> Loader:
    plan = FixedSizePlan(len(dataset), BATCH_SIZE, True, 3)
    return Loader(dataset, plan, seed=5, is_ahead=is_ahead)


@pytest.mark.parametrize("kind", [Drawn, Curriculum, OneBuffer, OneArray, Slow])
def test_each_batch_is_what_it_is_in_its_turn(kind: type[Drawn]) -> None:
    expected = loader_of(kind(), is_ahead=False).steps(0, 2)
    found = loader_of(kind()).steps(0, 2)
    for wanted, given in islice(zip(expected, found, strict=True), 3 * STEPS_OF_EPOCH):
        assert (wanted.epoch, wanted.step_in_epoch) == (given.epoch, given.step_in_epoch)
        assert repr(wanted.batch) == repr(given.batch)


def test_several_are_fetched_in_a_row_and_none_of_the_next_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ahead, "AHEAD_S", 60.0)
    dataset = Curriculum()
    steps = loader_of(dataset).steps(0, 0)
    next(steps)
    assert len(dataset.told) == 1 + STEPS_OF_EPOCH
    for _ in range(STEPS_OF_EPOCH - 1):
        next(steps)
    assert ("epoch", 1) not in dataset.told
    next(steps)
    assert ("epoch", 1) in dataset.told


@pytest.mark.parametrize(
    ("kind", "is_ahead", "ahead_s"),
    [(Slow, True, ahead.AHEAD_S), (OneBuffer, True, 60.0), (Drawn, False, 60.0)],
)
def test_what_is_slow_or_not_its_own_is_fetched_in_its_turn(
    kind: type[Drawn], is_ahead: bool, ahead_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "AHEAD_S", ahead_s)
    dataset = kind()
    steps = loader_of(dataset, is_ahead=is_ahead).steps(0, 0)
    next(steps)
    dataset.told.clear()
    for number in range(1, 6):
        next(steps)
        assert len(dataset.told) == number


def test_an_error_is_raised_when_its_turn_has_come() -> None:
    first_bad = 5
    broken = int(loader_of(Drawn()).plan.indices(0, first_bad)[0])
    steps = loader_of(Broken(broken)).steps(0, 0)
    good = [next(steps).step_in_epoch for _ in range(first_bad)]
    assert good == [*range(first_bad)]
    with pytest.raises(LoaderError, match="the disk is gone"):
        next(steps)
