"""What differs between a calm run and a stopped one, where it begins, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.training.checkpointing.diff import compare
from holdfast.training.runs.losses import KnownLosses, loss_files, loss_of
from holdfast.training.runs.paths import RunDirectory, parse_step

MAX_NAMED = 4


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        num_tensors, num_losses: what was compared.
        first_step: the first step whose loss differs; None where none does.
        losses: of that step, the calm one first.
        first_tensor: the first tensor or value that differs in the last checkpoint.
        num_differences: how many do.
        causes: what is behind it, in words; empty where nothing was found.
    """

    num_tensors: int
    num_losses: int
    first_step: int | None = None
    losses: tuple[float, float] | None = None
    first_tensor: str | None = None
    num_differences: int = 0
    causes: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether no byte differs."""
        return self.first_step is None and not self.num_differences


def compare_runs(calm: RunDirectory, other: RunDirectory) -> Verdict:
    """Hold the last checkpoints and all losses of two runs against each other."""
    first_step, losses, num_losses = _first_loss(calm, other)
    step = last_step(calm)
    if last_step(other) != step:
        told = f"the last checkpoint is of step {last_step(other)}, not {step}"
        return Verdict(0, num_losses, first_step, losses, told, 1)
    found = compare(calm.checkpoint(step), other.checkpoint(step))
    # What the two runs are called is no difference of theirs.
    differing = [one for one in found.differences if one.section != "configuration"]
    return Verdict(
        num_tensors=sum(found.num_tensors.values()),
        num_losses=num_losses,
        first_step=first_step,
        losses=losses,
        first_tensor=f"{differing[0].section}: {differing[0]}" if differing else None,
        num_differences=len(differing),
    )


def last_step(run: RunDirectory) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    if not run.checkpoints.is_dir():
        return 0
    steps = (parse_step(path.name) for path in run.checkpoints.iterdir())
    return max((step for step in steps if step is not None), default=0)


def not_kept(calm: Path, resumed: Path, step: int) -> list[str]:
    """What a resumed process found otherwise than a calm one had it, after the same step.

    Both files are of ``Trial.look_file``. Looked at before the first step after the resume, where
    what a step itself computes is not there yet.
    """
    there, here = (json.loads(path.read_text()) for path in (calm, resumed))
    before: Mapping[str, Any] = there.get(str(step), {})
    after: Mapping[str, Any] = here.get(str(step), {})
    changed = [name for name in before if name in after and before[name] != after[name]]
    return [f"{after[name][0]} {name}" for name in _outermost(changed)]


def _outermost(names: list[str]) -> list[str]:
    """Each object once: of ``x[3].y`` and ``x's length`` only what comes first."""
    seen: dict[str, str] = {}
    for name in names:
        root = name.partition("[")[0].partition("'")[0]
        seen.setdefault(root, name)
    return list(seen.values())


def _first_loss(
    calm: RunDirectory, other: RunDirectory
) -> tuple[int | None, tuple[float, float] | None, int]:
    known = KnownLosses(loss_files(calm), 0)
    num_compared = 0
    first: tuple[int, tuple[float, float]] | None = None
    for file in loss_files(other):
        for step, bits in enumerate(file.read(file.first_step), file.first_step):
            if not known.knows(step):
                continue
            num_compared += 1
            found = known.compare(step, bits, file.segment)
            if found is not None and (first is None or step < first[0]):
                first = step, (found.earlier_loss, loss_of(bits))
    return (None, None, num_compared) if first is None else (*first, num_compared)
