"""Timing of rivals side by side: each repetition runs all of them, so that drift hits all alike.

The order is shuffled anew for each repetition, because each finds what the one before it left in
the caches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median


def interleaved(
    cases: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, list[float]]:
    """The times of each case in seconds, after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order = random.Random(0)
    for repetition in range(repetitions + 1):
        for name in order.sample(list(cases), len(cases)):
            start_s = time.perf_counter()
            cases[name]()
            elapsed_s = time.perf_counter() - start_s
            if repetition > 0:
                seconds[name].append(elapsed_s)
    return seconds


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """What the block is given says, after it, how many seconds it took."""
    start_s = time.perf_counter()
    end_s: list[float] = []
    yield lambda: end_s[0] - start_s
    end_s.append(time.perf_counter())


def median_ratio(seconds: Sequence[float], reference_s: Sequence[float]) -> float:
    """The median over the repetitions of how much longer one case took than another."""
    return median(one / other for one, other in zip(seconds, reference_s, strict=True))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the documentation; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
