"""The state that a replay begins with: of the newest checkpoint before its first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from holdfast.training.checkpointing.loading import RestoredCheckpoint, load_checkpoint
from holdfast.training.checkpointing.manifest import Manifest, local_folder, manifest_of
from holdfast.training.checkpointing.storage import LocalReader
from holdfast.training.errors import CheckpointCorruptError
from holdfast.training.loop.state_validation import validate_state
from holdfast.training.runs.paths import RunDirectory, parse_step

logger = logging.getLogger(__name__)


def newest_before(run: RunDirectory, first_step: int) -> RestoredCheckpoint | None:
    """The newest good full checkpoint from which ``first_step`` is still to be done, or None.

    A damaged one is passed over, and left as it is. Raises StorageError.
    """
    reader = LocalReader(run.checkpoints)
    steps = (parse_step(name) for name in reader.names())
    for step in sorted((s for s in steps if s is not None and s < first_step), reverse=True):
        folder = local_folder(run.checkpoint(step))
        try:
            manifest = manifest_of(folder)
            if manifest.kind == "full":
                restored = load_checkpoint(folder, manifest)
                validate_state(restored)
                return restored
        except CheckpointCorruptError as error:
            logger.warning("passed over: %s", error)
    return None


def elsewhere(manifest: Manifest, versions: Mapping[str, str], device: str) -> tuple[str, ...]:
    """In what a checkpoint was made with other libraries or another device, in words."""
    there, here = {**manifest.versions, "device": manifest.device}, {**versions, "device": device}
    return tuple(
        f"{name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    )
