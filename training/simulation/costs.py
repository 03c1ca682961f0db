"""What a run costs where nothing stops it, out of its own records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from holdfast.training.errors import DataFormatError, InputError, StorageError
from holdfast.training.runs.directory import (
    RunDirectory,
    SegmentRecord,
    ledger_outcome,
    parse_step,
    read_segments,
)
from holdfast.training.runs.ledger import Life, lives
from holdfast.training.runs.stored_json import read_json

TAKEOVER_S = 15.0
"""From a machine's end without a word to the next segment: docs/coming_back.md."""
HANDOVER_S = 8.0
"""From the end of a segment that was told before to the next one: the engine and the child."""


@dataclass(frozen=True)
class RunCosts:
    """Seconds that a run's parts take.

    Attributes:
        num_steps: of the whole run.
        step_s: one step, with its share of validation.
        save_s: what a save takes from training.
        durable_s: from the start of a save until it is durable.
        start_s: of a segment, from its beginning until its first step.
        takeover_s: from a machine's end without a notice to the next segment's beginning, where a
            machine is there.
        handover_s: the same after a notice, from the end of the segment that saved.
        epoch_steps: steps after which a run saves whatever the clock says, those of an epoch or
            fewer; None for never.
    """

    num_steps: int
    step_s: float
    save_s: float
    durable_s: float
    start_s: float
    takeover_s: float = TAKEOVER_S
    handover_s: float = HANDOVER_S
    epoch_steps: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError that names a cost which is none."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            is_whole = entry.name.endswith("steps")
            if value is not None and not value >= (1 if is_whole else 0):
                smallest = "1" if is_whole else "0"
                raise InputError(f"{entry.name} must be at least {smallest}, found {value}")
        if not self.step_s > 0:
            raise InputError("step_s must be above 0: a step takes time")
        if self.durable_s < self.save_s:
            raise InputError(
                f"durable_s={self.durable_s:g} is less than save_s={self.save_s:g}: a save is "
                f"durable once training has its copy, and not before"
            )

    def saved_every(self, num_steps: int | None) -> RunCosts:
        """The same with a save after so many steps, too, where these are not more than now."""
        known = [number for number in (self.epoch_steps, num_steps) if number is not None]
        return replace(self, epoch_steps=min(known, default=None))

    @property
    def work_s(self) -> float:
        """All steps and validation, each of them once."""
        return self.num_steps * self.step_s

    @property
    def epoch_s(self) -> float:
        """Work from one end of an epoch that is saved to the next; all of it where none is."""
        return self.work_s if self.epoch_steps is None else self.epoch_steps * self.step_s


def read_costs(run: RunDirectory, every_epochs: int, given: dict[str, Any]) -> RunCosts:
    """What a run's records say, and what was ``given`` in its place.

    Args:
        run: one that has trained.
        every_epochs: after how many epochs it saves.
        given: values by name.

    Raises InputError where neither tells a cost; StorageError.
    """
    records = read_segments(run)
    every = list(lives(records))
    found = {
        "num_steps": max((record.end_step for record in records), default=0) or None,
        "step_s": _step_s(every),
        "save_s": _mean(record.save_s.get("snapshot_mean") for record in records),
        "durable_s": _mean(record.save_s.get("durable_mean") for record in records),
        "start_s": _mean(life.starting_s or None for life in every),
        "takeover_s": _pause_s(records, every, "killed") or TAKEOVER_S,
        "handover_s": _pause_s(records, every, "preempted") or HANDOVER_S,
        "epoch_steps": _epoch_steps(run, every_epochs),
    }
    return costs_of({**found, **given}, f"the records of {run.path}")


def costs_of(values: dict[str, Any], where: str) -> RunCosts:
    """The costs with these values. Raises InputError that names those that ``where`` lacks."""
    needed = ("num_steps", "step_s", "save_s", "durable_s", "start_s")
    lacking = [f"--{name.replace('_', '-')}" for name in needed if values.get(name) is None]
    if lacking:
        raise InputError(f"{where} do not tell {', '.join(lacking)}: give what they lack")
    return RunCosts(**values)


def _step_s(every: Sequence[Life]) -> float | None:
    num_steps = sum(life.num_steps for life in every)
    return sum(life.working_s for life in every) / num_steps if num_steps > 0 else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _pause_s(records: Sequence[SegmentRecord], every: Sequence[Life], outcome: str) -> float | None:
    """Median pause after segments that ended so."""
    pauses = [
        max(0.0, after.begin_s - before.end_s)
        for record, (before, after) in zip(records, pairwise(every), strict=False)
        if ledger_outcome(record, is_alive=False) == outcome
    ]
    return median(pauses) if pauses else None


def _epoch_steps(run: RunDirectory, every_epochs: int) -> int | None:
    """Steps between two saved ends of epochs, as the newest of them tells; None without one."""
    names = [path.name for path in run.checkpoints.iterdir()] if run.checkpoints.is_dir() else []
    steps = sorted((step for step in map(parse_step, names) if step is not None), reverse=True)
    for step in steps:
        try:
            manifest = read_json(run.checkpoint(step) / "manifest.json")
        except (FileNotFoundError, DataFormatError, StorageError):
            continue  # what a checkpoint is worth is no question here
        if isinstance(manifest, dict) and manifest.get("trigger") == "epoch":
            epoch = manifest.get("epoch")
            if isinstance(epoch, int) and epoch > 0:
                return max(1, step // epoch) * every_epochs
    return None
