"""Which checkpoint of a run is meant: a step, the best one, or the latest."""

from __future__ import annotations

from pathlib import Path

from holdfast.training.checkpointing.manifest import Manifest, read_manifest
from holdfast.training.checkpointing.policy import KeepBest, newest_full
from holdfast.training.checkpointing.storage import LocalReader
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import InputError
from holdfast.training.runs.paths import RunDirectory, parse_step
from holdfast.training.tiers.viewing import CHECKPOINTS, viewed

BEST, LATEST = "best", "latest"
MAX_STEPS_SHOWN = 8


def chosen_checkpoint(run: RunDirectory, at: str, config: RunConfig) -> Manifest:
    """The manifest of the checkpoint that is meant.

    Args:
        run: the run.
        at: a step; ``best`` by ``selection.metric``; ``latest`` of those that are full.
        config: of the run.

    Raises:
        InputError: there is none; names those that are there.
        CheckpointCorruptError, StorageError: it cannot be read.
    """
    manifests = checkpoints_of(run)
    if not manifests:
        raise InputError(f"{run.path} has no checkpoint yet: train until one is saved")
    if at == BEST:
        best = KeepBest(config.selection.metric, config.selection.mode)
        steps = best.keep([manifest.info for manifest in manifests.values()])
    elif at == LATEST:
        steps = newest_full([manifest.info for manifest in manifests.values()])
    elif at.isdecimal():
        steps = {int(at)} & manifests.keys()
    else:
        raise InputError(f"{at!r} is no checkpoint: name a step, as 420, or {BEST!r}")
    if not steps:
        told = f"step {at}" if at.isdecimal() else f"the {at} step"
        raise InputError(
            f"{run.path} has no checkpoint of {told}; there are those of {_shown(manifests)}"
        )
    return manifests[max(steps)]


def require_full(run: RunDirectory, manifest: Manifest) -> None:
    """Make sure that training can go on from a checkpoint. Raises InputError with another way."""
    if manifest.kind == "full":
        return
    manifests = checkpoints_of(run)
    full = {step: one for step, one in manifests.items() if one.kind == "full"}
    path = run.checkpoint(manifest.step)
    raise InputError(
        f"the checkpoint of step {manifest.step} holds weights alone, without the optimizer's "
        f"state: begin a new run with --set train.initial_weights={path}, or take a full one, "
        f"{_shown(full) if full else 'of which there are none'}; checkpoint.keep_every_steps "
        f"keeps some"
    )


def read_checkpoint(checkpoint: Path) -> None:
    """Read one checkpoint's files from the bucket that its run was read from; none of others.

    Raises StorageError.
    """
    viewed(RunDirectory(checkpoint.parent.parent), (f"{CHECKPOINTS}{checkpoint.name}/",))


def checkpoints_of(run: RunDirectory) -> dict[int, Manifest]:
    """All manifests by step. Raises CheckpointCorruptError or StorageError."""
    names = LocalReader(run.checkpoints).names() if run.checkpoints.is_dir() else []
    steps = sorted(step for step in map(parse_step, names) if step is not None)
    return {step: read_manifest(Path(run.checkpoint(step))) for step in steps}


def _shown(manifests: dict[int, Manifest]) -> str:
    steps = [f"{step} ({one.kind})" for step, one in sorted(manifests.items())]
    hidden = len(steps) - MAX_STEPS_SHOWN
    more = [f"and {hidden} earlier ones"] if hidden > 0 else []
    return ", ".join([*steps[-MAX_STEPS_SHOWN:], *more])
