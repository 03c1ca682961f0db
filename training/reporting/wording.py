"""Numbers, times and counts as the page writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"
NO_VALUE = "\N{EN DASH}"
MAX_DECIMALS = 9


def decimals_for(values: Iterable[float], num_digits: int = 4) -> int:
    """Decimals that give the largest of the values so many digits; a column is aligned by them."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    largest = max(finite, default=0.0)
    if all(value == int(value) for value in finite):
        return 0
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return min(MAX_DECIMALS, max(0, num_digits - 1 - exponent))


def number(value: float | None, decimals: int | None = None) -> str:
    """A number with thousands apart and a real minus sign; a dash for none.

    Without ``decimals`` it has four significant digits.
    """
    if value is None or not math.isfinite(value):
        return NO_VALUE
    places = decimals_for([value]) if decimals is None else decimals
    # A rate of 1e-12 would need more decimals than anybody counts.
    text = f"{value:.3g}" if 0 < abs(value) < 10.0**-MAX_DECIMALS else f"{value:,.{places}f}"
    return text.replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", MINUS)


def signed(value: float, decimals: int | None = None) -> str:
    """A difference, with its sign."""
    return ("+" if value > 0 else "") + number(value, decimals)


def percent(share: float) -> str:
    """A share of one, as per cent."""
    return f"{100 * share:.1f}\N{NARROW NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    place = next(i for i, (_, size) in enumerate(units) if whole >= size)
    (large, size), (small, small_size) = units[place], units[min(place + 1, 3)]
    return f"{whole // size} {large} {whole % size // small_size} {small}"


def plural(count: int, thing: str) -> str:
    """A count of things."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}".replace(",", "\N{NARROW NO-BREAK SPACE}")
