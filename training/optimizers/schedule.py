"""Learning rates: torch's schedulers, by name, alone or composed, after a warm-up."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from holdfast.training.configuration.loading import nearest, validated
from holdfast.training.configuration.schema import SchedulerConfig, Section, WarmupConfig
from holdfast.training.errors import ConfigError
from holdfast.training.optimizers.building import CONFIGURED, class_of, construct, subclasses_in
from holdfast.training.optimizers.factors import Factors, labelled_groups
from holdfast.training.optimizers.rate_trace import RateTrace

FUNCTION = "it takes a function: write rate_factor(step) in the experiment"
UNSUPPORTED_SCHEDULERS = {
    "LRScheduler": "other schedulers derive from it",
    "_LRScheduler": "other schedulers derive from it",
    "LambdaLR": FUNCTION,
    "MultiplicativeLR": FUNCTION,
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


class Schedule:
    """Linear warm-up, then the configured scheduler: of each optimizer, or of those it names.

    The scheduler does not move during the warm-up. An experiment may say the rate in its place,
    with ``rate_factor(step)``, and weight decay with ``weight_decay_factor(step)``. ``traces`` are
    what the rates of the parameter groups were, by label.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        scheduler: SchedulerConfig,
        warmup: WarmupConfig,
        num_steps_per_epoch: int,
        experiment: object = None,
    ) -> None:
        self._config = scheduler
        self._start_factor = warmup.start_factor
        self._num_warmup_steps = warmup.num_epochs * num_steps_per_epoch + warmup.num_steps
        self._num_steps = 0
        self._groups = labelled_groups(optimizers)
        self._factors = Factors(experiment, self._groups)
        if self._factors.has_rate and (scheduler.name is not None or self._num_warmup_steps):
            raise ConfigError(
                f"{type(experiment).__name__}.rate_factor says the rate of every step: leave "
                f"scheduler.name and warmup out, or the method"
            )
        moved = _chosen(optimizers, scheduler.optimizers)
        self._schedulers: dict[str, lr_scheduler.LRScheduler] = {
            name: built
            for name, optimizer in moved.items()
            if (built := build_scheduler(scheduler, optimizer)) is not None
        }
        self._targets = [(group, group.options["lr"]) for group in labelled_groups(moved)]
        self._apply_warmup()
        self._factors.apply(0)
        self.traces = {group.label: RateTrace() for group in self._groups}
        self._record()

    @property
    def rate(self) -> float:
        """The learning rate of the first parameter group."""
        return self._groups[0].rate

    @property
    def trace(self) -> RateTrace:
        """What the rate of the first parameter group was."""
        return self.traces[self._groups[0].label]

    def after_step(self) -> None:
        """Move on by one optimizer step."""
        self._num_steps += 1
        if self._num_steps <= self._num_warmup_steps:
            self._apply_warmup()
        elif self._config.interval == "step":
            self._move()
        self._factors.apply(self._num_steps)
        self._record()

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        """Move on by one epoch, whose validation metrics are given."""
        if self._num_steps <= self._num_warmup_steps and self._num_warmup_steps:
            return
        for scheduler in self._schedulers.values():
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(named_metric(metrics, self._config.metric, "scheduler.metric"))
        if self._config.interval == "epoch":
            self._move()
        self._record()

    def require_length(self, num_steps: int, epoch_ends: Iterable[int]) -> None:
        """Make sure that a scheduler which has an end does not reach it before training does.

        ``epoch_ends``: after how many steps each epoch ends. Raises ConfigError where OneCycleLR
        has fewer steps than it will take.
        """
        if not self._schedulers:
            return
        if self._config.interval == "step":
            num_taken = num_steps - self._num_warmup_steps
        else:
            num_taken = sum(end > self._num_warmup_steps for end in epoch_ends)
        for scheduler in self._schedulers.values():
            for key, part, num_steps_taken in _parts("scheduler.args", scheduler, num_taken):
                total_steps = getattr(part, "total_steps", None)
                if total_steps is not None and total_steps < num_steps_taken:
                    raise ConfigError(
                        f"{key} give {type(part).__name__} {total_steps} steps, and with "
                        f"scheduler.interval = {self._config.interval!r} training takes "
                        f"{num_steps_taken}; write {key}.total_steps={num_steps_taken}"
                    )

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, the schedulers' own state, and the traces."""
        inner = {name: scheduler.state_dict() for name, scheduler in self._schedulers.items()}
        is_one = not inner or CONFIGURED in inner
        own = {"scheduler": inner.get(CONFIGURED, {})} if is_one else {"schedulers": inner}
        traces = {label: trace.state_dict() for label, trace in self.traces.items()}
        state = {"num_steps": self._num_steps, **own, "trace": self.trace.state_dict()}
        return {**state, "traces": traces} if len(traces) > 1 else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. The optimizer restores the rates themselves."""
        self._num_steps = state["num_steps"]
        traces = state.get("traces") or {self._groups[0].label: state.get("trace")}
        for label in self.traces:
            self.traces[label] = RateTrace.restored(traces.get(label))
        inner = state.get("schedulers") or {CONFIGURED: state.get("scheduler")}
        for name, scheduler in self._schedulers.items():
            scheduler.load_state_dict(inner[name])
            for _, part, _ in _parts("", scheduler, 0):
                if isinstance(part, lr_scheduler.MultiStepLR):  # a checkpoint has dicts alone
                    part.milestones = Counter(part.milestones)

    def _record(self) -> None:
        for group in self._groups:
            self.traces[group.label].record(self._num_steps, group.rate)

    def _move(self) -> None:
        """Step the schedulers that need no metric."""
        for name, scheduler in self._schedulers.items():
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                continue
            with nullcontext() if name == CONFIGURED else warnings.catch_warnings():
                if name != CONFIGURED:  # one of several may not have moved yet: no mistake
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self._step(scheduler)

    def _step(self, scheduler: lr_scheduler.LRScheduler) -> None:
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
        for group, target in self._targets:
            group.options["lr"] = target if fraction == 1.0 else target * factor


class _Part(Section):
    """A scheduler within another one."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class _Chained(Section):
    schedulers: tuple[_Part, ...] = Field(min_length=1)


class _Sequential(_Chained):
    milestones: tuple[int, ...]


COMPOSED: dict[str, type[_Chained]] = {"ChainedScheduler": _Chained, "SequentialLR": _Sequential}


def build_scheduler(
    config: SchedulerConfig, optimizer: Optimizer
) -> lr_scheduler.LRScheduler | None:
    """The configured scheduler, or None for a constant rate."""
    if config.name is None:
        return None
    return _scheduler("scheduler", config.name, config.args, optimizer)


def _scheduler(
    key: str, name: str, args: Mapping[str, Any], optimizer: Optimizer
) -> lr_scheduler.LRScheduler:
    own = {
        **subclasses_in(lr_scheduler, lr_scheduler.LRScheduler),
        "InverseSquareRoot": InverseSquareRoot,
    }
    found = class_of(key, name, own, UNSUPPORTED_SCHEDULERS, lr_scheduler.LRScheduler)
    if (table := COMPOSED.get(name)) is None:
        scheduler: lr_scheduler.LRScheduler = construct(key, found, optimizer, args)
        return scheduler
    composed = validated(table, args, prefix=f"{key}.args.")
    nested = [part.name for part in composed.schedulers if part.name in COMPOSED]
    if nested and isinstance(composed, _Sequential):  # torch fails where such a part begins
        raise ConfigError(
            f"{key}.args.schedulers: {nested[0]} cannot be a part of SequentialLR: list its "
            f"schedulers themselves, or put SequentialLR into a ChainedScheduler"
        )
    parts = [
        _scheduler(f"{key}.args.schedulers[{number}]", part.name, part.args, optimizer)
        for number, part in enumerate(composed.schedulers)
    ]
    try:
        if isinstance(composed, _Sequential):
            return lr_scheduler.SequentialLR(optimizer, parts, list(composed.milestones))
        return lr_scheduler.ChainedScheduler(parts, optimizer)
    except ValueError as error:
        raise ConfigError(f"{key}.args = {dict(args)} do not fit: {error}") from error


def _parts(
    key: str, scheduler: lr_scheduler.LRScheduler, num_taken: int
) -> Iterator[tuple[str, lr_scheduler.LRScheduler, int]]:
    """Key, scheduler and number of its steps, of each scheduler that is not composed of others."""
    if not isinstance(scheduler, (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler)):
        yield key, scheduler, num_taken
        return
    lengths = [num_taken] * len(scheduler._schedulers)
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        starts = scheduler._milestones  # a step to where a part starts is none that the part takes
        ends = [*(start - 1 for start in starts), num_taken]
        lengths = [end - start for start, end in zip([0, *starts], ends, strict=True)]
    for number, (part, length) in enumerate(zip(scheduler._schedulers, lengths, strict=True)):
        yield from _parts(f"{key}.schedulers[{number}].args", part, length)


def _chosen(optimizers: Mapping[str, Optimizer], names: tuple[str, ...]) -> Mapping[str, Optimizer]:
    """The optimizers whose rates are scheduled: those that are named, or all."""
    if unknown := [name for name in names if name not in optimizers or name == CONFIGURED]:
        raise ConfigError(
            f"scheduler.optimizers = {list(names)}: there is no optimizer {unknown[0]!r}; "
            f"{nearest(unknown[0], optimizers)}"
        )
    return {name: optimizers[name] for name in names} if names else optimizers


def named_metric(metrics: Mapping[str, float], name: str, key: str) -> float:
    """A metric by name; ``key`` is the configuration key that named it."""
    if name not in metrics:
        raise ConfigError(f"{key} = {name!r} is not a metric; {nearest(name, metrics)}")
    return metrics[name]
