"""Greedy soup: checkpoints are added to an average as long as validation does not get worse.

Wortsman et al.: "Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time" (2022, arXiv:2203.05482), recipe 1. Each step is told before
the next one is begun, so that another process can go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GreedyStep:
    """One trial.

    Attributes:
        step: the checkpoint that was added.
        metric: of the average with it on validation data; None where it is not finite.
        is_kept: whether it stays.
    """

    step: int
    metric: float | None
    is_kept: bool


def greedy_soup(
    ranked: Sequence[int],
    mode: Literal["min", "max"],
    measure: Callable[[Sequence[int]], float | None],
    known: Sequence[GreedyStep] = (),
    on_steps: Callable[[Sequence[GreedyStep]], None] = lambda _: None,
) -> list[GreedyStep] | None:
    """Try checkpoints one after the other; the first one always stays.

    Args:
        ranked: steps of checkpoints, the best first.
        mode: whether small or large metrics are good.
        measure: metric of the average of some checkpoints; None to stop here.
        known: trials that an earlier process made.
        on_steps: told all trials after each new one.

    Returns all trials, or None where ``measure`` said stop.
    """
    steps = list(known)
    for step in ranked[len(steps) :]:
        kept = [trial for trial in steps if trial.is_kept]
        value = measure([*(trial.step for trial in kept), step])
        if value is None:
            return None
        metric = value if math.isfinite(value) else None
        is_kept = not kept or _is_as_good(metric, kept[-1].metric, mode)
        steps.append(GreedyStep(step, metric, is_kept))
        on_steps(steps)
    return steps


def _is_as_good(metric: float | None, other: float | None, mode: Literal["min", "max"]) -> bool:
    if metric is None or other is None:
        return metric is not None
    return metric <= other if mode == "min" else metric >= other
