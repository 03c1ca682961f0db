"""Rates and weight decay as functions of the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer

from holdfast.training.configuration.schema import SchedulerConfig, WarmupConfig
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.optimizers.building import CONFIGURED
from holdfast.training.optimizers.optimizer_state import capture_optimizer, restore_optimizer
from holdfast.training.optimizers.schedule import Schedule


class Halving:
    def rate_factor(self, step: int) -> Any:
        return 0.5**step


class Apart(Halving):
    def rate_factor(self, step: int) -> Any:
        return {"a": 0.5**step, "b": 1}

    def weight_decay_factor(self, step: int) -> Any:
        return 1.0 + step


class Wrong:
    def __init__(self, found: Any) -> None:
        self._found = found

    def rate_factor(self, step: int) -> Any:
        return self._found


def grouped(**options: Any) -> Optimizer:
    layer = nn.Linear(2, 2)
    groups = [{"name": "a", "params": [layer.weight]}, {"name": "b", "params": [layer.bias]}]
    return SGD(groups, lr=0.8, weight_decay=0.1, **options)


def schedule_of(optimizer: Optimizer, experiment: object, **scheduler: Any) -> Schedule:
    config = SchedulerConfig(**scheduler)
    return Schedule({CONFIGURED: optimizer}, config, WarmupConfig(), 10, experiment)


def options(optimizer: Optimizer, name: str) -> list[float]:
    return [group[name] for group in optimizer.param_groups]


def test_a_factor_holds_for_all_groups_or_for_each_by_its_name() -> None:
    optimizer = grouped()
    schedule = schedule_of(optimizer, Halving())
    assert options(optimizer, "lr") == [0.8, 0.8]
    schedule.after_step()
    assert options(optimizer, "lr") == [0.4, 0.4]
    assert options(optimizer, "weight_decay") == [0.1, 0.1]
    optimizer = grouped()
    schedule = schedule_of(optimizer, Apart())
    schedule.after_step()
    schedule.after_step()
    assert options(optimizer, "lr") == [0.2, 0.8]
    assert options(optimizer, "weight_decay") == [0.1 * 3, 0.1 * 3]
    assert schedule.rate == 0.2
    rates = {label: [rate for _, rate in trace.points] for label, trace in schedule.traces.items()}
    assert rates == {"a": [0.8, 0.4, 0.2], "b": [0.8, 0.8, 0.8]}


def test_a_restored_schedule_of_factors_goes_on_with_the_same_rates() -> None:
    model = nn.Linear(2, 2)

    def begun() -> tuple[Optimizer, Schedule]:
        groups = [{"name": "a", "params": [model.weight]}, {"name": "b", "params": [model.bias]}]
        optimizer = SGD(groups, lr=0.8, weight_decay=0.1)
        return optimizer, schedule_of(optimizer, Apart())

    optimizer, schedule = begun()
    for _ in range(3):
        schedule.after_step()
    other, other_schedule = begun()
    restore_optimizer(other, model, capture_optimizer(optimizer, model))
    other_schedule.load_state_dict(schedule.state_dict())
    for _ in range(3):
        assert options(other, "lr") == options(optimizer, "lr")
        assert options(other, "weight_decay") == options(optimizer, "weight_decay")
        schedule.after_step()
        other_schedule.after_step()
    assert other_schedule.state_dict() == schedule.state_dict()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": 1.0}, r"says nothing of the group 'b'; allowed: a$"),
        (None, "must be a number from 0 on.*; found None"),
        (-0.1, "found -0.1"),
        (float("nan"), "found nan"),
        (True, "found True"),
        (torch.tensor(0.5), "found tensor"),
        ({"a": 1.0, "b": "half"}, "found 'half'"),
    ],
)
def test_a_factor_that_is_none_is_refused(found: Any, message: str) -> None:
    with pytest.raises(ExperimentError, match=rf"Wrong\.rate_factor\(0\) .*{message}"):
        schedule_of(grouped(), Wrong(found))


def test_there_is_one_who_says_the_rate() -> None:
    with pytest.raises(ConfigError, match=r"Halving\.rate_factor says the rate of every step"):
        schedule_of(grouped(), Halving(), name="StepLR", args={"step_size": 1})
    with pytest.raises(ConfigError, match="and warmup out"):
        Schedule(
            {CONFIGURED: grouped()}, SchedulerConfig(), WarmupConfig(num_steps=1), 10, Halving()
        )


def test_a_factor_of_nothing_is_refused() -> None:
    optimizer = LBFGS(nn.Linear(2, 2).parameters())
    with pytest.raises(ExperimentError, match="no parameter group has a weight_decay"):
        schedule_of(optimizer, Apart())
