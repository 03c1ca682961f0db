"""What the newest checkpoint of a script's run holds of one object, before anything is restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from holdfast.training.checkpointing.json_state import decode
from holdfast.training.checkpointing.loading import load_parts
from holdfast.training.checkpointing.manifest import STATE_NAME, TENSOR_SUFFIX
from holdfast.training.checkpointing.model_weights import all_laid_out
from holdfast.training.checkpointing.storage import LocalReader
from holdfast.training.errors import CheckpointCorruptError
from holdfast.training.runs.paths import RunDirectory, parse_step

PARTS = (STATE_NAME, f"state{TENSOR_SUFFIX}")


@dataclass(frozen=True)
class Newest:
    """The state of one kept object, and the step that it is of."""

    step: int
    state: dict[str, Any]


def newest_state(run: RunDirectory, name: str) -> Newest | None:
    """The newest one that can be read; None where there is no checkpoint or no such object.

    Takes no lease: whoever restores makes sure that it was this one.
    """
    names = LocalReader(run.checkpoints).names() if run.checkpoints.is_dir() else []
    for step in sorted((s for s in map(parse_step, names) if s is not None), reverse=True):
        try:
            restored = load_parts(run.checkpoint(step), PARTS)
        except CheckpointCorruptError:
            continue  # damaged, or weights alone: restoring says so
        state: Any = restored.state
        strides = state.get("layouts", {}).get("state", {})
        kept = decode(state["experiment"], all_laid_out(restored.tensors["state"], strides))
        found = kept["kept"]["others"].get(name)
        return None if found is None else Newest(step, found)
    return None
