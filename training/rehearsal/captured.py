"""A state as a checkpoint would hold it, without a disk: through its bytes and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.training.checkpointing.json_state import PAIRS
from holdfast.training.checkpointing.manager import RESUME_FILES
from holdfast.training.checkpointing.manifest import STATE_NAME, TENSOR_SUFFIX
from holdfast.training.checkpointing.snapshot import FileImage, SnapshotBuffers, json_image
from holdfast.training.checkpointing.tensor_file import parse_tensors
from holdfast.training.configuration.schema import Json
from holdfast.training.loop.state import TrainState

ABSENT = object()
MAX_SHOWN = 4


@dataclass(frozen=True)
class Captured:
    """What a checkpoint would hold.

    Attributes:
        tensors: file stem -> name -> tensor on the CPU.
        state: the content of ``state.json``.
        num_bytes: of all files together; ``num_weights_bytes`` once it is slimmed.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Json
    num_bytes: int
    num_weights_bytes: int

    def digests(self) -> dict[str, str]:
        """One for each tensor and each value, by its path."""
        return {**digests_of(self.tensors), **dict(_leaves(self.state, STATE_NAME))}


def capture(state: TrainState) -> Captured:
    """The state, written and read as a checkpoint is.

    Raises UnsupportedStateError where something can't be written.
    """
    tensors, values = state.capture()
    text = json_image(values, "state")
    images = SnapshotBuffers().take(tensors)
    files = {**images, STATE_NAME: text}
    stems = {name: name.removesuffix(TENSOR_SUFFIX) for name in images}
    return Captured(
        tensors={stems[name]: _parsed(image) for name, image in images.items()},
        state=json.loads(_content(text)),
        num_bytes=sum(image.size_bytes for image in files.values()),
        num_weights_bytes=sum(
            image.size_bytes for name, image in files.items() if name not in RESUME_FILES
        ),
    )


def digests_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """One for each tensor on the CPU, by its path."""
    return {
        f"{stem}/{name}": _digest(tensor)
        for stem, inner in tensors.items()
        for name, tensor in inner.items()
    }


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Paths of what differs, in order."""
    return sorted(
        path
        for path in one.keys() | other.keys()
        if one.get(path, ABSENT) != other.get(path, ABSENT)
    )


def shown(paths: list[str]) -> str:
    """A few of them, and how many more there are."""
    more = f" and {len(paths) - MAX_SHOWN} more" if len(paths) > MAX_SHOWN else ""
    return f"{', '.join(paths[:MAX_SHOWN])}{more}"


def _content(image: FileImage) -> bytes:
    return b"".join(bytes(part) for part in image.parts)


def _parsed(image: FileImage) -> dict[str, Tensor]:
    return parse_tensors(torch.frombuffer(bytearray(_content(image)), dtype=torch.uint8), "trial")


def _digest(tensor: Tensor) -> str:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.blake2b(flat.data).hexdigest()}"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and set(value) == {PAIRS}:
        keys = [key for key, _ in value[PAIRS]]
        yield f"{path}: order of keys", json.dumps(keys)
        value = {str(key): item for key, item in value[PAIRS]}
    if isinstance(value, (dict, list)) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            yield from _leaves(item, f"{path}/{key}")
    else:
        yield path, json.dumps(value)
