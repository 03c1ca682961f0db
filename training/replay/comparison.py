"""The steps that are asked for, the losses that the run has kept of them, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from holdfast.training.errors import InputError
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.durable_json import without_nan
from holdfast.training.runs.losses import Difference, KnownLosses, bits_of, loss_files
from holdfast.training.runs.paths import RunDirectory

RANGE = re.compile(r"([0-9]{1,15})(?::([0-9]{1,15}))?")


@dataclass(frozen=True)
class Steps:
    """Steps from the first to the last, both of them; the first step of a run is 1."""

    first: int
    last: int

    @staticmethod
    def parse(text: str) -> Steps:
        """Of ``100:120``, or of one step. Raises InputError."""
        found = RANGE.fullmatch(text)
        if found is None:
            raise InputError(f"--steps {text}: expected FIRST:LAST, as 100:120, or one step")
        steps = Steps(int(found[1]), int(found[2] or found[1]))
        if not 1 <= steps.first <= steps.last:
            raise InputError(
                f"--steps {text}: expected a first step of 1 or more and a last one that is not "
                f"before it"
            )
        return steps

    def __str__(self) -> str:
        return f"{self.first:,} to {self.last:,}"


@dataclass(frozen=True)
class Replayed:
    """What came of doing steps again.

    Attributes:
        begun_after: the step of the checkpoint that it began with; 0 for the run's beginning.
        last_step: the last step that was done; earlier than asked for where one differed.
        num_compared: of the steps done, those whose loss the run had kept.
        difference: the first step that had another loss; None where none had.
        surroundings: in what this machine and its libraries are others than that checkpoint's.
    """

    begun_after: int
    last_step: int
    num_compared: int
    difference: Difference | None = None
    surroundings: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        """Whether every loss that could be compared has the bits that were kept."""
        return self.difference is None

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        told: dict[str, Any] = without_nan({"is_same": self.is_same, **asdict(self)})
        return told

    @staticmethod
    def from_json(told: dict[str, Any]) -> Replayed:
        """What ``as_json`` gave."""
        found = told["difference"]
        if found is not None:  # as words, where they are not finite
            found |= {name: float(found[name]) for name in ("earlier_loss", "loss")}
        return Replayed(
            begun_after=told["begun_after"],
            last_step=told["last_step"],
            num_compared=told["num_compared"],
            difference=None if found is None else Difference(**found),
            surroundings=tuple(told["surroundings"]),
        )

    def lines(self) -> list[str]:
        """For people; the last line is the verdict."""
        begun = f"the checkpoint of step {self.begun_after:,}" if self.begun_after else "the seed"
        num_done = self.last_step - self.begun_after
        told = [
            f"replayed {num_done:,} steps, from {begun} to step {self.last_step:,}; "
            f"{self.num_compared:,} compared"
        ]
        told += [f"elsewhere: {words}" for words in self.surroundings]
        if self.difference is None:
            return [*told, "same     all with the same bits"]
        found = self.difference
        return [
            *told,
            f"DIFFERS  step {found.step:,} had the loss {found.earlier_loss!r} in segment "
            f"{found.segment}, and has {found.loss!r} now",
        ]


class AllDone(Exception):  # nothing is wrong
    """Enough was replayed: the last step is done, or one differed."""


class Comparing:
    """Holds the losses of steps that are done again against those that the run has kept.

    Raises InputError where it has none of the steps that are asked for.
    """

    def __init__(self, run: RunDirectory, steps: Steps, begun_after: int) -> None:
        require_kept(run, steps)
        self._files = loss_files(run)
        self._known = KnownLosses(self._files, begun_after)
        self._steps = steps
        self._begun_after = self._last_step = begun_after
        self._num_compared = 0
        self._difference: Difference | None = None

    def add(self, step: int, loss: Tensor | float | None) -> None:
        """Take the loss of a step. Raises AllDone after the last one, and where it differs."""
        self._last_step = step
        if loss is not None and self._known.knows(step):
            value = loss.double().item() if isinstance(loss, Tensor) else float(loss)
            self._num_compared += 1
            self._difference = self._known.compare(step, bits_of(value), self._segment(step))
        if self._difference is not None or step >= self._steps.last:
            raise AllDone

    def result(self, surroundings: tuple[str, ...]) -> Replayed:
        """What was found so far."""
        return Replayed(
            self._begun_after, self._last_step, self._num_compared, self._difference, surroundings
        )

    def _segment(self, step: int) -> int:
        """The newest segment that has kept this step's loss."""
        kept = [f.segment for f in self._files if f.first_step <= step <= f.end_step]
        return max(kept)


def require_kept(run: RunDirectory, steps: Steps) -> None:
    """Make sure that there is something to compare with. Raises InputError that says what is."""
    files = loss_files(run)
    num_done = max(
        [segment.end_step for segment in read_segments(run)] + [file.end_step for file in files],
        default=0,
    )
    if steps.last > num_done:
        raise InputError(f"--steps {steps}: {run.path} has done {num_done:,} steps so far")
    if not any(f.first_step <= steps.last and f.end_step >= steps.first for f in files):
        kept = ", ".join(f"{f.first_step:,} to {f.end_step:,}" for f in files if f.num_steps)
        raise InputError(
            f"--steps {steps}: {run.path} has kept no loss of these; "
            f"{f'it has those of {kept}' if kept else 'it has none at all'}"
        )


def told_to(tell: Callable[[str], None], steps: Steps, begun_after: int) -> None:
    """Say what is going to be done."""
    begun = f"the checkpoint of step {begun_after:,}" if begun_after else "the beginning"
    tell(f"from {begun}: {steps.last - begun_after:,} steps to do")
