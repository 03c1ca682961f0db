"""State that an experiment keeps of its own, and its way into every stage after training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from holdfast.training.checkpointing.loading import load_state_part
from holdfast.training.checkpointing.manifest import read_manifest
from holdfast.training.checkpointing.policy import newest_full
from holdfast.training.checkpointing.storage import LocalReader
from holdfast.training.runs.paths import RunDirectory, parse_step


@runtime_checkable
class Stateful(Protocol):
    """An experiment may keep state of its own; it is then part of every checkpoint."""

    def state_dict(self) -> Mapping[str, Any]:
        """JSON and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """Put back what ``state_dict`` returned."""
        ...


def experiment_checkpoint(run: RunDirectory) -> Path | None:
    """The checkpoint that training ended with, which holds the experiment's state; None: none."""
    names = LocalReader(run.checkpoints).names() if run.checkpoints.is_dir() else []
    steps = sorted(step for step in map(parse_step, names) if step is not None)
    infos = [read_manifest(run.checkpoint(step)).info for step in steps]
    newest = newest_full(infos)
    return run.checkpoint(next(iter(newest))) if newest else None


def restore_experiment(experiment: object, checkpoint: Path | None) -> None:
    """Put the experiment's own state back, so that it scores as it did at the end of training.

    Does nothing for an experiment that keeps none. Raises CheckpointCorruptError or StorageError.
    """
    if checkpoint is None or not isinstance(experiment, Stateful):
        return
    experiment.load_state_dict(load_state_part(checkpoint, "experiment"))
