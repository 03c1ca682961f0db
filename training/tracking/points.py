"""What there is to send: scalars by step, read from what the run keeps. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.training.runs.event_log import scalars_of
from holdfast.training.runs.losses import loss_files, loss_of
from holdfast.training.runs.paths import RunDirectory, parse_step
from holdfast.training.runs.stored_json import STATE, read_json

STEP_LOSS = "step/loss"


@dataclass(frozen=True)
class Point:
    """Finite scalars of one step, by tag."""

    step: int
    values: Mapping[str, float]


def durable_points(run: RunDirectory, after: Mapping[str, int]) -> Iterator[Point]:
    """The scalars that the newest durable full checkpoint covers, by step.

    A resume goes back no further than that checkpoint, so none of them is ever taken back. The
    tags are those of TensorBoard's event files; each step's loss is ``step/loss``.

    Args:
        run: the run.
        after: by tag, the newest step that is known already, and left out with all before it.
    """
    covered, state = newest_durable(run)
    points: dict[int, dict[str, float]] = {}
    for step, loss in _losses(run, after.get(STEP_LOSS, 0), covered):
        points[step] = {STEP_LOSS: loss}
    for record in state.get("history", ()):
        told = scalars_of("validation", record)
        fresh = {tag: value for tag, value in told.items() if record["step"] > after.get(tag, 0)}
        if fresh and record["step"] <= covered:
            points.setdefault(record["step"], {}).update(fresh)
    for step in sorted(points):
        yield Point(step, points[step])


def newest_durable(run: RunDirectory) -> tuple[int, dict[str, Any]]:
    """The step and the state of the newest checkpoint that can be resumed from; 0 without one."""
    names = [path.name for path in run.checkpoints.iterdir()] if run.checkpoints.is_dir() else []
    steps = sorted((step for step in map(parse_step, names) if step is not None), reverse=True)
    for step in steps:
        try:
            state = read_json(run.checkpoint(step) / "state.json", STATE)
        except FileNotFoundError:
            continue  # of weights alone, or pruned meanwhile
        if isinstance(state, dict):
            return step, state
    return 0, {}


def _losses(run: RunDirectory, after_step: int, up_to: int) -> Iterator[tuple[int, float]]:
    """Finite losses of steps; of one that was done often, the newest."""
    found: dict[int, float] = {}
    for file in loss_files(run):
        first = max(file.first_step, after_step + 1)
        if first <= min(file.end_step, up_to):
            found.update(zip(range(first, up_to + 1), map(loss_of, file.read(first)), strict=False))
    for step in sorted(found):
        if math.isfinite(found[step]):
            yield step, found[step]
