"""The learning rates of a run, in little space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_POINTS = 256


@dataclass
class RateTrace:
    """The rates of every so many steps, from 0: ``points`` are steps and their rates.

    Each time that there are more than MAX_POINTS, every second one is dropped. What is kept depends
    on the step alone, so a run that was interrupted keeps what one without interruptions keeps.
    """

    every: int = 1
    points: list[tuple[int, float]] = field(default_factory=list)

    def record(self, step: int, rate: float) -> None:
        """Take the rate of a step; all steps in order, the newest may be taken again."""
        if step % self.every:
            return
        if self.points and self.points[-1][0] == step:
            self.points.pop()
        self.points.append((step, rate))
        if len(self.points) > MAX_POINTS:
            self.every *= 2
            self.points = [point for point in self.points if point[0] % self.every == 0]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, which has no tuples."""
        return {"every": self.every, "points": [list(point) for point in self.points]}

    @classmethod
    def restored(cls, state: Mapping[str, Any] | None) -> RateTrace:
        """What ``state_dict`` returned; empty for a checkpoint from before there were traces."""
        if state is None:
            return cls()
        return cls(int(state["every"]), [(int(step), rate) for step, rate in state["points"]])
