"""Optimizer and learning rate: torch's own, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from holdfast.training.configuration.constructor_arguments import check_arguments
from holdfast.training.configuration.loading import nearest
from holdfast.training.configuration.schema import (
    OptimizerConfig,
    SchedulerConfig,
    WarmupConfig,
)
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.optimizers.rate_trace import RateTrace

# What needs a closure, sparse gradients, other schedulers or functions is not configurable.
UNSUPPORTED_OPTIMIZERS = {"LBFGS", "SparseAdam", "Optimizer"}
UNSUPPORTED_SCHEDULERS = {
    "LRScheduler",
    "_LRScheduler",
    "ChainedScheduler",
    "SequentialLR",
    "LambdaLR",
    "MultiplicativeLR",
}


class InverseSquareRoot(lr_scheduler.LRScheduler):
    """rate = base · √(timescale / (timescale + t)), t steps after the warm-up.

    With a warm-up of as many steps as ``timescale_steps`` this is the schedule of Vaswani et al.
    2017, "Attention is all you need", section 5.3.
    """

    def __init__(self, optimizer: Optimizer, timescale_steps: int) -> None:
        self.timescale_steps = timescale_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group."""
        factor = math.sqrt(self.timescale_steps / (self.timescale_steps + self.last_epoch))
        return [base * factor for base in self.base_lrs]


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The configured optimizer over all trainable parameters.

    Raises:
        ConfigError: there is no such optimizer, or it does not take these arguments.
        ExperimentError: the model has nothing to train.
    """
    classes = _subclasses_in(torch.optim, Optimizer, exclude=UNSUPPORTED_OPTIMIZERS)
    if config.name not in classes:
        raise ConfigError(
            f"optimizer.name = {config.name!r} is not supported; {nearest(config.name, classes)}"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ExperimentError(
            f"the model {type(model).__name__} has no parameters that require gradients: there is "
            "nothing to train; check what the experiment's model() returns"
        )
    optimizer: Optimizer = _construct("optimizer", classes[config.name], parameters, config.args)
    return optimizer


class Schedule:
    """Linear warm-up, then the configured scheduler.

    The scheduler does not move during the warm-up. ``trace`` is what the rate was.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: SchedulerConfig,
        warmup: WarmupConfig,
        num_steps_per_epoch: int,
    ) -> None:
        self._optimizer = optimizer
        self._config = scheduler
        self._start_factor = warmup.start_factor
        self._num_warmup_steps = warmup.num_epochs * num_steps_per_epoch + warmup.num_steps
        self._num_steps = 0
        self._scheduler = build_scheduler(scheduler, optimizer)
        self._targets: list[float] = [group["lr"] for group in optimizer.param_groups]
        self._apply_warmup()
        self.trace = RateTrace()
        self.trace.record(0, self.rate)

    @property
    def rate(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self._optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Move on by one optimizer step."""
        self._num_steps += 1
        if self._num_steps <= self._num_warmup_steps:
            self._apply_warmup()
        elif self._config.interval == "step" and not self._is_plateau and self._scheduler:
            self._move(self._scheduler)
        self.trace.record(self._num_steps, self.rate)

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        """Move on by one epoch, whose validation metrics are given."""
        if self._num_steps <= self._num_warmup_steps and self._num_warmup_steps:
            return
        if isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step(named_metric(metrics, self._config.metric, "scheduler.metric"))
        elif self._config.interval == "epoch" and self._scheduler:
            self._move(self._scheduler)
        self.trace.record(self._num_steps, self.rate)

    def require_length(self, num_steps: int, num_steps_per_epoch: int) -> None:
        """Make sure that a scheduler which has an end does not reach it before training does.

        Raises:
            ConfigError: OneCycleLR has fewer steps than it will take.
        """
        total_steps = getattr(self._scheduler, "total_steps", None)
        if self._config.interval == "step":
            num_taken = num_steps - self._num_warmup_steps
        else:
            num_epochs = math.ceil(num_steps / num_steps_per_epoch)
            num_taken = num_epochs - self._num_warmup_steps // num_steps_per_epoch
        if total_steps is not None and total_steps < num_taken:
            raise ConfigError(
                f"scheduler.args give {self._config.name} {total_steps} steps, and with "
                f"scheduler.interval = {self._config.interval!r} training takes {num_taken}; "
                f"write scheduler.args.total_steps={num_taken}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, the scheduler's own state, and the trace."""
        inner = self._scheduler.state_dict() if self._scheduler else {}
        trace = self.trace.state_dict()
        return {"num_steps": self._num_steps, "scheduler": inner, "trace": trace}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. The optimizer restores the rates themselves."""
        self._num_steps = state["num_steps"]
        self.trace = RateTrace.restored(state.get("trace"))
        if self._scheduler:
            self._scheduler.load_state_dict(state["scheduler"])

    @property
    def _is_plateau(self) -> bool:
        return isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau)

    def _move(self, scheduler: lr_scheduler.LRScheduler) -> None:
        try:
            scheduler.step()
        except (ValueError, ArithmeticError) as error:
            raise ConfigError(
                f"scheduler {self._config.name} with scheduler.args = {self._config.args} cannot "
                f"take its next step: {error}; correct scheduler.args under another run id"
            ) from error

    def _apply_warmup(self) -> None:
        if not self._num_warmup_steps:
            return
        fraction = self._num_steps / self._num_warmup_steps
        factor = self._start_factor + (1.0 - self._start_factor) * fraction
        for group, target in zip(self._optimizer.param_groups, self._targets, strict=True):
            group["lr"] = target if fraction == 1.0 else target * factor


def build_scheduler(
    config: SchedulerConfig, optimizer: Optimizer
) -> lr_scheduler.LRScheduler | None:
    """The configured scheduler, or None for a constant rate."""
    if config.name is None:
        return None
    classes = _subclasses_in(lr_scheduler, lr_scheduler.LRScheduler, exclude=UNSUPPORTED_SCHEDULERS)
    classes["InverseSquareRoot"] = InverseSquareRoot
    if config.name not in classes:
        raise ConfigError(
            f"scheduler.name = {config.name!r} is not supported; {nearest(config.name, classes)}"
        )
    scheduler: lr_scheduler.LRScheduler = _construct(
        "scheduler", classes[config.name], optimizer, config.args
    )
    return scheduler


def named_metric(metrics: Mapping[str, float], name: str, key: str) -> float:
    """A metric by name; ``key`` is the configuration key that named it."""
    if name not in metrics:
        raise ConfigError(f"{key} = {name!r} is not a metric; {nearest(name, metrics)}")
    return metrics[name]


def _subclasses_in(module: Any, base: type, exclude: set[str]) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and name not in exclude
    }


def _construct(section: str, factory: Any, subject: Any, args: Mapping[str, Any]) -> Any:
    check_arguments(f"{section}.args", factory, args)
    try:
        return factory(subject, **args)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ConfigError(f"{section}.args = {dict(args)} do not fit: {error}") from error
