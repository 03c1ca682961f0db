"""What lies in a script's variables, and what a step computes: for trials of a resume."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from holdfast.training.experiment.error_places import is_users
from holdfast.training.rehearsal.hidden import Fingerprints, state_of, tensor_digest


def seen_variables() -> Fingerprints:
    """Fingerprints of all variables of the script: globals, and locals of the running functions."""
    names: dict[str, Any] = {}
    for frame in _users_frames():
        names = {**frame.f_globals, **frame.f_locals, **names}
    own = {
        name: value
        for name, value in names.items()
        if not name.startswith("__") and not type(value).__module__.startswith("holdfast.")
    }
    return state_of(own)


class Traced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a line for each operator: its name, digests of what went in and out, and the place."""

    def __init__(self, path: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._file = path.open("w")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator."""
        inputs = _digests((args, kwargs or {}))  # before it: some write to what they are given
        result = func(*args, **(kwargs or {}))
        told = [str(func), inputs, _digests(result), _place()]
        self._file.write(json.dumps(told) + "\n")
        self._file.flush()
        return result


def _digests(nest: Any) -> list[str]:
    return [
        tensor_digest(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf)[:80]
        for leaf in tree_leaves(nest)
    ]


def _place() -> str:
    frames = traceback.extract_stack(limit=40)
    users = [f for f in frames if not f.filename.startswith("<") and is_users(Path(f.filename))]
    return f"{users[-1].filename}:{users[-1].lineno}" if users else "the backward pass"


def _users_frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(Path(frame.f_code.co_filename)):
            yield frame
        frame = frame.f_back
