from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.training.configuration.schema import OptimizerConfig, SchedulerConfig, WarmupConfig
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.optimizers.building import CONFIGURED, build_optimizer
from holdfast.training.optimizers.optimizer_state import capture_optimizer, restore_optimizer
from holdfast.training.optimizers.schedule import (
    UNSUPPORTED_SCHEDULERS,
    InverseSquareRoot,
    Schedule,
)

PARTS = [
    {"name": "LinearLR", "args": {"total_iters": 3}},
    {"name": "MultiStepLR", "args": {"milestones": [3, 5], "gamma": 0.5}},
    {"name": "ExponentialLR", "args": {"gamma": 0.9}},
]
SEQUENCE = {
    "schedulers": [
        {"name": "LinearLR", "args": {"start_factor": 0.5, "total_iters": 2}},
        {"name": "InverseSquareRoot", "args": {"timescale_steps": 4}},
        {"name": "MultiStepLR", "args": {"milestones": [2, 4], "gamma": 0.1}},
    ],
    "milestones": [3, 10],
}

CHAIN = {"schedulers": [{"name": "SequentialLR", "args": SEQUENCE}, PARTS[2]]}


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def optimizer_of(model: nn.Module, name: str = "AdamW", **args: Any) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig(name=name, args={"lr": 0.1, **args}), model)


EPOCH_ENDS = (10, 20, 30, 40, 45)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).square().sum().backward()
        optimizer.step()


def schedule_of(
    optimizer: torch.optim.Optimizer,
    scheduler: dict[str, Any] | None = None,
    warmup: dict[str, Any] | None = None,
    num_steps_per_epoch: int = 10,
) -> Schedule:
    return Schedule(
        {CONFIGURED: optimizer},
        SchedulerConfig(**(scheduler or {})),
        WarmupConfig(**(warmup or {})),
        num_steps_per_epoch,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="AdamX"), "did you mean .Adam"),
        (OptimizerConfig(name="LBFGS"), "not supported"),
        (OptimizerConfig(args={"learning_rate": 1}), "learning_rate"),
        (OptimizerConfig(args={"lr": -1.0}), "Invalid learning rate"),
        (OptimizerConfig(name="Adamw"), "did you mean 'AdamW'"),
        (OptimizerConfig(name="SparseAdam"), "not supported"),
        (OptimizerConfig(args={"lr": "high"}), r"optimizer\.args\.lr = 'high': expected a number"),
        (OptimizerConfig(args={"betas": 0.9}), r"optimizer\.args\.betas = 0\.9: expected a list"),
        (OptimizerConfig(args={"fused": True, "foreach": True}), "fused.*foreach"),
    ],
)
def test_a_bad_optimizer_is_named(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(config, small_model())


def test_a_bad_scheduler_is_named() -> None:
    optimizer = optimizer_of(small_model())
    with pytest.raises(ConfigError, match="did you mean 'CosineAnnealingLR'"):
        schedule_of(optimizer, {"name": "CosineAnealingLR"})
    with pytest.raises(ConfigError, match=r"scheduler\.args"):
        schedule_of(optimizer, {"name": "StepLR"})


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_SCHEDULERS))
def test_a_scheduler_that_no_file_can_describe_is_not_offered(name: str) -> None:
    with pytest.raises(ConfigError, match="not supported") as caught:
        schedule_of(optimizer_of(small_model()), {"name": name})
    assert name not in str(caught.value).partition("allowed: ")[2].split(", ")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("StepLR", {"step_size": "x"}, r"scheduler\.args\.step_size = 'x': expected an integer"),
        ("StepLR", {"step_size": 1, "last_epoch": 3}, r"unknown key scheduler\.args\.last_epoch"),
        ("MultiStepLR", {"milestones": 3}, r"write scheduler\.args\.milestones=\[3\]"),
        ("ReduceLROnPlateau", {"mode": "maxi"}, r"scheduler\.args\.mode = 'maxi': must be 'min'"),
        ("InverseSquareRoot", {"timescale_steps": 0}, "division by zero"),
        ("SequentialLR", {}, r"scheduler\.args\.schedulers is missing"),
        (
            "ChainedScheduler",
            {"schedulers": []},
            r"scheduler\.args\.schedulers = \[\]: .* at least 1",
        ),
        ("ChainedScheduler", {"schedulers": [{"args": {}}]}, r"schedulers\[0\]\.name is missing"),
        (
            "SequentialLR",
            {"schedulers": [{"name": "StepLR", "args": {"step_size": 2}}], "milestones": [3]},
            "do not fit: Sequential Schedulers expects",
        ),
        (
            "SequentialLR",
            {"schedulers": [{"name": "StepLR", "args": {"step_size": "x"}}], "milestones": []},
            r"scheduler\.args\.schedulers\[0\]\.args\.step_size = 'x': expected an integer",
        ),
        (
            "ChainedScheduler",
            {"schedulers": [{"name": "LambdaLR"}]},
            r"scheduler\.args\.schedulers\[0\]\.name = 'LambdaLR' .* write rate_factor\(step\)",
        ),
        (
            "ChainedScheduler",
            {"schedulers": [{"name": "ReduceLROnPlateau"}]},
            "does not support `ReduceLROnPlateau`",
        ),
        (
            "SequentialLR",
            {"schedulers": [{"name": "ChainedScheduler", "args": {}}], "milestones": []},
            "ChainedScheduler cannot be a part of SequentialLR: list its schedulers themselves",
        ),
        ("torch.optim:SGD", {}, "is no torch.optim.lr_scheduler.LRScheduler"),
    ],
)
def test_a_bad_argument_of_a_scheduler_is_named(
    name: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule_of(optimizer_of(small_model()), {"name": name, "args": args})


def test_a_model_without_parameters_is_named() -> None:
    with pytest.raises(ExperimentError, match="the model ReLU has no parameters"):
        build_optimizer(OptimizerConfig(), nn.ReLU())


@pytest.mark.parametrize(("interval", "num_taken"), [("step", 35), ("epoch", 4)])
def test_a_scheduler_that_ends_before_training_does_is_refused(
    interval: str, num_taken: int
) -> None:
    def one_cycle(total_steps: int) -> tuple[Schedule, torch.optim.Optimizer]:
        args = {"max_lr": 0.1, "total_steps": total_steps}
        scheduler = {"name": "OneCycleLR", "args": args, "interval": interval}
        optimizer = optimizer_of(small_model())
        return schedule_of(optimizer, scheduler, {"num_steps": 10}), optimizer

    def train_45_steps(schedule: Schedule, optimizer: torch.optim.Optimizer) -> None:
        for step in range(1, 46):
            optimizer.step()
            schedule.after_step()
            if step % 10 == 0 or step == 45:
                schedule.after_epoch({})

    schedule, optimizer = one_cycle(num_taken)
    schedule.require_length(45, EPOCH_ENDS)
    train_45_steps(schedule, optimizer)
    short, optimizer = one_cycle(num_taken - 1)
    with pytest.raises(ConfigError, match=rf"write scheduler\.args\.total_steps={num_taken}$"):
        short.require_length(45, EPOCH_ENDS)
    with pytest.raises(ConfigError, match="cannot take its next step"):
        train_45_steps(short, optimizer)


def test_a_scheduler_within_another_has_to_last_as_long_as_its_part() -> None:
    def sequence(total_steps: int) -> tuple[Schedule, torch.optim.Optimizer]:
        one_cycle = {"name": "OneCycleLR", "args": {"max_lr": 0.1, "total_steps": total_steps}}
        parts = [one_cycle, {"name": "ExponentialLR", "args": {"gamma": 0.9}}, one_cycle]
        args = {"schedulers": parts, "milestones": [6, 20]}
        optimizer = optimizer_of(small_model())
        scheduler = {"name": "SequentialLR", "args": args, "interval": "step"}
        return schedule_of(optimizer, scheduler), optimizer

    schedule, optimizer = sequence(10)
    schedule.require_length(30, 10)
    for _ in range(30):
        optimizer.step()
        schedule.after_step()
    short, _ = sequence(9)
    place = r"scheduler\.args\.schedulers\[2\]\.args"
    with pytest.raises(ConfigError, match=rf"{place} give .* write {place}\.total_steps=10$"):
        short.require_length(30, 10)


def test_schedulers_in_a_row_each_have_their_part() -> None:
    optimizer = optimizer_of(small_model())
    parts = [
        {"name": "ConstantLR", "args": {"factor": 0.5, "total_iters": 9}},
        {"name": "InverseSquareRoot", "args": {"timescale_steps": 1}},
    ]
    args = {"schedulers": parts, "milestones": [2]}
    schedule = schedule_of(
        optimizer, {"name": "SequentialLR", "args": args, "interval": "step"}, {"num_steps": 1}
    )
    rates = []
    for _ in range(5):
        optimizer.step()
        schedule.after_step()
        rates.append(schedule.rate)
    assert rates == [0.05, 0.05, 0.1, 0.1 * math.sqrt(1 / 2), 0.1 * math.sqrt(1 / 3)]


def test_the_scheduler_moves_the_optimizers_that_it_names() -> None:
    model = small_model()
    halves = {"name": "StepLR", "args": {"step_size": 1, "gamma": 0.5}, "interval": "step"}

    def rates_after(num_steps: int, *names: str) -> list[float]:
        optimizers = {name: torch.optim.SGD(model.parameters(), lr=1.0) for name in ("a", "b")}
        config = SchedulerConfig(**halves, optimizers=names)
        schedule = Schedule(optimizers, config, WarmupConfig(num_steps=2, start_factor=0.5), 10)
        for _ in range(num_steps):
            schedule.after_step()
        state = schedule.state_dict()
        assert state["schedulers"].keys() == set(names or "ab")
        assert state["traces"].keys() == {"a", "b"}
        return [optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()]

    assert rates_after(0) == [0.5, 0.5]
    assert rates_after(3) == [0.5, 0.5]
    assert rates_after(4, "b") == [1.0, 0.25]
    with pytest.raises(ConfigError, match=r"there is no optimizer 'c'; allowed: a, b"):
        rates_after(1, "c")


def test_warm_up_is_linear_and_ends_at_the_exact_rate() -> None:
    optimizer = optimizer_of(small_model())
    schedule = schedule_of(optimizer, warmup={"num_steps": 4, "start_factor": 0.2})
    rates = [schedule.rate]
    for _ in range(6):
        optimizer.step()
        schedule.after_step()
        rates.append(schedule.rate)
    assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert rates[4:] == [0.1, 0.1, 0.1]


def test_the_scheduler_waits_for_the_end_of_the_warm_up() -> None:
    optimizer = optimizer_of(small_model())
    schedule = schedule_of(
        optimizer,
        {"name": "StepLR", "args": {"step_size": 1, "gamma": 0.5}},
        {"num_epochs": 1},
        num_steps_per_epoch=3,
    )
    rates = []
    for _ in range(3):
        for _ in range(3):
            optimizer.step()
            schedule.after_step()
        schedule.after_epoch({})
        rates.append(schedule.rate)
    assert rates == [0.1, 0.05, 0.025]


def test_plateau_watches_the_configured_metric() -> None:
    optimizer = optimizer_of(small_model())
    schedule = schedule_of(
        optimizer,
        {"name": "ReduceLROnPlateau", "args": {"factor": 0.5, "patience": 0}, "metric": "rmse"},
    )
    for value in (3.0, 4.0):
        schedule.after_epoch({"rmse": value, "loss": 0.0})
    assert schedule.rate == 0.05
    with pytest.raises(ConfigError, match=r"scheduler\.metric = 'rmse' is not a metric"):
        schedule.after_epoch({"rsme": 1.0})


def test_inverse_square_root_is_the_formula_of_the_paper() -> None:
    optimizer = optimizer_of(small_model())
    scheduler = InverseSquareRoot(optimizer, timescale_steps=4)
    for step in range(1, 20):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * math.sqrt(4 / (4 + step)))


@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "CosineAnnealingLR", "args": {"T_max": 20}, "interval": "step"},
        {"name": "OneCycleLR", "args": {"max_lr": 0.3, "total_steps": 50}, "interval": "step"},
        {"name": "MultiStepLR", "args": {"milestones": [1, 2]}},
        {"name": "InverseSquareRoot", "args": {"timescale_steps": 3}, "interval": "step"},
        {"name": "SequentialLR", "args": SEQUENCE, "interval": "step"},
        {"name": "ChainedScheduler", "args": {"schedulers": PARTS}, "interval": "step"},
        {"name": "ChainedScheduler", "args": CHAIN, "interval": "step"},
        {"name": "torch.optim.lr_scheduler:StepLR", "args": {"step_size": 2}},
    ],
)
def test_a_restored_schedule_goes_on_with_the_same_rates(scheduler: dict[str, Any]) -> None:
    def advance(schedule: Schedule, optimizer: torch.optim.Optimizer, num: int) -> list[float]:
        rates = []
        for step in range(num):
            optimizer.step()
            schedule.after_step()
            if step % 4 == 3:
                schedule.after_epoch({})
            rates.append(schedule.rate)
        return rates

    model = small_model()
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer, scheduler, {"num_steps": 2})
    advance(schedule, optimizer, 8)
    saved = capture_optimizer(optimizer, model)
    state = schedule.state_dict()
    other_optimizer = optimizer_of(model)
    other = schedule_of(other_optimizer, scheduler, {"num_steps": 2})
    restore_optimizer(other_optimizer, model, saved)
    other.load_state_dict(state)
    assert advance(other, other_optimizer, 12) == advance(schedule, optimizer, 12)
    assert other.trace == schedule.trace
    assert len(other.trace.points) == 21


def test_the_trace_has_the_rate_of_each_step() -> None:
    optimizer = optimizer_of(small_model())
    step_lr = {"name": "StepLR", "args": {"step_size": 1, "gamma": 0.5}}
    schedule = schedule_of(optimizer, step_lr, {"num_steps": 2, "start_factor": 0.5})
    taken = []
    for step in range(6):
        taken.append((step, schedule.rate))
        optimizer.step()
        schedule.after_step()
        if step % 3 == 2:
            schedule.after_epoch({})
    assert schedule.trace.points[:6] == taken
    assert [rate for _, rate in taken] == pytest.approx([0.05, 0.075, 0.1, 0.05, 0.05, 0.05])
