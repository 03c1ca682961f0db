"""Scales of charts: where a value lies, and which values are marked. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOG_FROM_RATIO = 30.0
"""Values that span more than this are drawn on a logarithmic scale, if all are above zero."""


@dataclass(frozen=True)
class Axis:
    """Maps values from low to high onto places from start to end (units of the drawing)."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, to a tenth."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        part = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self, num: int = 4) -> list[float]:
        """About so many round values within the axis."""
        if self.is_log:
            return _log_ticks(self.low, self.high, num)
        step = round_step((self.high - self.low) / max(1, num))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        # Multiplied and rounded: 3 * 0.1 is not 0.3.
        return [float(f"{number * step:.12g}") for number in range(first, last + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def fitted(values: Sequence[float], start: float, end: float, *, may_log: bool = False) -> Axis:
    """An axis over all the values, with some air; logarithmic where they span much."""
    low, high = min(values), max(values)
    if may_log and low > 0 and high / low > LOG_FROM_RATIO:
        return Axis(low / 1.15, high * 1.15, start, end, is_log=True)
    air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    # What is never negative does not get an axis that begins below zero.
    bottom = max(0.0, low - air) if low >= 0 else low - air
    return Axis(bottom, high + air, start, end)


def round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if step <= 0 or not math.isfinite(step):
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """A tick's value as short as it can be told apart from its neighbours."""
    largest = max(abs(tick) for tick in ticks)
    if 0 < largest < 1e-3 or largest >= 1e6:
        digits = next(
            (n for n in range(3, 17) if len({f"{tick:.{n}g}" for tick in ticks}) == len(ticks)), 17
        )
        text = f"{value:.{digits}g}"
        return text.replace("e-0", "e-").replace("e+0", "e").replace("-", "\u2212")
    text = f"{value:.10f}".rstrip("0").rstrip(".")
    if "." not in text and abs(value) >= 10000:
        text = f"{value:,.0f}".replace(",", "\u202f")
    return text.replace("-", "\u2212")


def _log_ticks(low: float, high: float, num: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [
            float(f"{factor}e{power}")
            for power in decades
            for factor in factors
            if low <= factor * 10.0**power <= high
        ]
        if len(ticks) <= num + 2:
            return ticks
    return ticks[:: math.ceil(len(ticks) / num)]
