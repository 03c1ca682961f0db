"""Many starts of one run: what the online interval makes of them, and what the best one would."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from holdfast.training.checkpointing.policy import SaveSchedule
from holdfast.training.configuration.schema import PricesConfig
from holdfast.training.runs.ledger import Ledger
from holdfast.training.simulation.capacity import (
    Capacity,
    ExponentialCapacity,
    Trace,
    TraceCapacity,
)
from holdfast.training.simulation.costs import RunCosts
from holdfast.training.simulation.money import Money, money_of
from holdfast.training.simulation.simulator import Saving, fixed, online, simulate

INTERVALS_PER_DOUBLING = 2


@dataclass(frozen=True)
class Summary:
    """What some starts of a run came to, all with the same rule of saving.

    Attributes:
        total: the sum of their ledgers.
        finish_s: seconds from the start to the end, of each.
        is_endless: one of them never ends; those after it were not looked at.
    """

    total: Ledger
    finish_s: tuple[float, ...]
    is_endless: bool

    @property
    def useful_share(self) -> float:
        """Goodput of all of them together; 0 where one never ends."""
        return 0.0 if self.is_endless else self.total.goodput

    @property
    def mean(self) -> Ledger | None:
        """Of one of them; None where one never ends."""
        if self.is_endless:
            return None
        num = len(self.finish_s)
        values = {entry.name: getattr(self.total, entry.name) for entry in fields(Ledger)}
        counts = {name: round(value / num) for name, value in values.items() if name[:4] == "num_"}
        return Ledger(**{**{name: value / num for name, value in values.items()}, **counts})


@dataclass(frozen=True)
class Study:
    """A run against machines that come and go.

    Attributes:
        costs: of the run.
        found: with the interval that training finds for itself.
        best: with the best of the fixed intervals, in hindsight.
        best_interval_s: that interval; infinite for ends of epochs alone.
        money: of one run, in the mean, with the online interval; None without prices.
    """

    costs: RunCosts
    found: Summary
    best: Summary
    best_interval_s: float
    money: Money | None

    @property
    def closeness(self) -> float:
        """The useful share of the online interval, as a part of that of the best one."""
        best = max(self.best.useful_share, self.found.useful_share)
        return self.found.useful_share / best if best else 1.0

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "costs": {entry.name: getattr(self.costs, entry.name) for entry in fields(self.costs)},
            "online": _as_json(self.found),
            "best": _as_json(self.best),
            "best_interval_s": None if math.isinf(self.best_interval_s) else self.best_interval_s,
            "closeness": self.closeness,
            "money": None if self.money is None else self.money.as_json(),
        }


def study(
    costs: RunCosts,
    starts: Sequence[Callable[[], Capacity]],
    schedule: SaveSchedule,
    default_mean_s: float,
    prices: PricesConfig,
) -> Study:
    """Simulate each start with the online interval, and with every fixed one.

    Args:
        costs: of the run.
        starts: each makes the machines of one start anew.
        schedule: by which training saves.
        default_mean_s: what it assumes between two preemptions before it knows better.
        prices: of machines.
    """
    found = summarized(costs, starts, online(schedule, costs, default_mean_s))
    by_interval = {one: summarized(costs, starts, fixed(one)) for one in _intervals_s(costs)}
    best_s = max(by_interval, key=lambda one: by_interval[one].useful_share)
    mean = found.mean
    money = None if mean is None else money_of(mean, prices)
    return Study(costs, found, by_interval[best_s], best_s, money)


def summarized(
    costs: RunCosts, starts: Sequence[Callable[[], Capacity]], saving: Saving
) -> Summary:
    """All starts with one rule of saving."""
    ended: list[Ledger] = []
    for start in starts:
        ledger = simulate(costs, start(), saving)
        if ledger is None:
            break
        ended.append(ledger)
    sums = {entry.name: sum(getattr(one, entry.name) for one in ended) for entry in fields(Ledger)}
    finish_s = tuple(sorted(one.total_s for one in ended))
    return Summary(Ledger(**sums), finish_s, is_endless=len(ended) < len(starts))


def starts_in(trace: Trace, num_starts: int) -> list[Callable[[], Capacity]]:
    """Runs that begin at times spread evenly over a trace."""
    places = [number * trace.length_s / num_starts for number in range(num_starts)]
    return [lambda at_s=at_s: TraceCapacity(trace, at_s) for at_s in places]  # type: ignore[misc]


def exponential_starts(
    mean_s: float, notice_s: float, share_without: float, seed: int, num_starts: int
) -> list[Callable[[], Capacity]]:
    """Runs whose machines live exponentially, each with draws of its own."""
    seeds = [f"{seed}/{number}" for number in range(num_starts)]
    return [
        lambda own=own: ExponentialCapacity(mean_s, notice_s, share_without, own)  # type: ignore[misc]
        for own in seeds
    ]


def _intervals_s(costs: RunCosts) -> list[float]:
    """From the shortest that makes sense to ends of epochs alone."""
    shortest_s = max(costs.step_s, costs.durable_s)
    num = math.ceil(INTERVALS_PER_DOUBLING * math.log2(max(1.0, costs.epoch_s / shortest_s)))
    within = [shortest_s * 2 ** (n / INTERVALS_PER_DOUBLING) for n in range(num)]
    return [*within, math.inf]


def _as_json(summary: Summary) -> dict[str, Any]:
    mean = summary.mean
    return {
        "finish_s": {
            "mean": fmean(summary.finish_s) if summary.finish_s else None,
            "fastest": min(summary.finish_s, default=None),
            "slowest": max(summary.finish_s, default=None),
        },
        "useful_share": summary.useful_share,
        "is_endless": summary.is_endless,
        "mean": None
        if mean is None
        else {entry.name: getattr(mean, entry.name) for entry in fields(mean)},
    }
