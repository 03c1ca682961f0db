"""Batches that a sampler of torch's draws: the same however a process got to its epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from holdfast.training.data.sampled_plan import SampledPlan
from holdfast.training.errors import InputError

SIZE = 23
ITEMS = range(SIZE)


class ByEpoch(Sampler[int]):
    """Knows its epoch because it is told."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch, SIZE))


class OfEverything(Sampler[int]):
    """Draws from every global generator."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(9):
            yield int(random.random() * 5 + np.random.random() * 5 + torch.rand(()) * 5)


class Once(Sampler[int]):
    """Goes on where it was left."""

    def __init__(self) -> None:
        self.items = iter(range(40))

    def __iter__(self) -> Iterator[int]:
        return (next(self.items) for _ in range(5))


def in_batches(sampler: Sampler[int], *, should_drop_last: bool = False) -> BatchSampler:
    return BatchSampler(sampler, 4, should_drop_last)


def batches(plan: SampledPlan, epoch: int) -> list[list[int]]:
    return [plan.indices(epoch, step).tolist() for step in range(plan.num_steps(epoch))]


SAMPLERS = {
    "sequential": lambda: SequentialSampler(ITEMS),
    "with replacement": lambda: RandomSampler(ITEMS, replacement=True, num_samples=11),
    "its own generator": lambda: RandomSampler(ITEMS, generator=torch.Generator()),
    "weighted": lambda: WeightedRandomSampler([1.0 + i for i in ITEMS], 13),
    "by epoch": ByEpoch,
    "of everything": OfEverything,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epoch_is_the_same_from_everywhere(name: str) -> None:
    from_the_start = SampledPlan(in_batches(SAMPLERS[name]()), 7)
    told = [batches(from_the_start, epoch) for epoch in range(6)]
    torch.rand(3), random.random(), np.random.random()
    resumed = SampledPlan(in_batches(SAMPLERS[name]()), 7)
    assert batches(resumed, 4) == told[4]
    assert batches(from_the_start, 1) == told[1]  # an epoch that is held no more


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"sequential"}))
def test_epochs_differ(name: str) -> None:
    plan = SampledPlan(in_batches(SAMPLERS[name]()), 7)
    assert batches(plan, 0) != batches(plan, 1)


def test_generators_are_left_as_they_were() -> None:
    own = torch.Generator().manual_seed(5)
    before = own.get_state(), torch.get_rng_state(), random.getstate()
    plan = SampledPlan(in_batches(RandomSampler(ITEMS, generator=own)), 7)
    batches(plan, 3)
    assert torch.equal(own.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        (Once(), "gives other batches when its epoch is drawn again"),
        (SequentialSampler(range(3)), "gives no batch"),
    ],
)
def test_what_has_no_order_of_an_epoch_is_refused(sampler: Sampler[int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        SampledPlan(in_batches(sampler, should_drop_last=True), 7)
