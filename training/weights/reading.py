"""Weights that somebody gives: which file it is, its digest, and its tensors by name.

Safetensors files, checkpoints and bundles of ours are only numbers. A file of ``torch.save`` may
hold code: it is read with ``weights_only=True``, and what needs more is refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.training.checkpointing.loading import MODEL_NAME, load_weights
from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.manifest import MANIFEST_NAME
from holdfast.training.checkpointing.slices import digest_of_part, is_part
from holdfast.training.checkpointing.tensor_file import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    parse_tensors,
)
from holdfast.training.errors import DataFormatError, DataNotFoundError
from holdfast.training.runs.stored_json import read_json, shape_expected

ALGORITHM = "sha256"
ENTRIES = ("model", "state_dict", "model_state_dict", "net", "network", "weights", "module")
"""What the weights are called in files that hold more, the likeliest first."""
MAX_NAMES_SHOWN = 5
EXPECTED = (
    "a safetensors file, a checkpoint (step-...), a bundle, or a file of torch.save that holds "
    "tensors by name"
)
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class TorchFile:
    """What a file of ``torch.save`` holds.

    Attributes:
        content: all of it.
        entry: what the weights are called in it; empty where they are all of it.
        weights: by name.
    """

    content: Any
    entry: str
    weights: Mapping[str, Tensor]


def weights_file(place: Path) -> Path:
    """The file that holds the weights of a place, or stands for the slices of a checkpoint.

    Raises DataNotFoundError for none.
    """
    file = place / MODEL_NAME if place.is_dir() else place
    if is_part(file):
        return file
    found = f"it is a folder without {MODEL_NAME}" if place.is_dir() else "there is no such file"
    raise DataNotFoundError(f"{place} gives no weights, {found}; expected {EXPECTED}")


def file_digest(file: Path) -> str:
    """``sha256:...`` of a file. Raises CheckpointCorruptError or StorageError."""
    return digest_of_part(file, ALGORITHM)


def read_weights(place: Path) -> dict[str, Tensor]:
    """The tensors of a place by name, on the CPU. What a manifest says of the file is verified.

    Raises:
        DataNotFoundError: there is nothing.
        DataFormatError: it holds no weights, or would need code to be read.
        CheckpointCorruptError: the bytes are not those that a manifest names.
        StorageError: it cannot be read.
    """
    file = weights_file(place)
    if place.is_dir() and (place / MANIFEST_NAME).is_file():
        return _of_ours(place, file)
    if is_safetensors(file):
        content, _ = read_file(file, ALGORITHM)
        return parse_tensors(content, str(file))
    return dict(read_torch_file(file).weights)


def is_safetensors(file: Path) -> bool:
    """Whether a file begins as safetensors do."""
    with file.open("rb") as stream:
        head = stream.read(LENGTH_BYTES + 1)
    size = int.from_bytes(head[:LENGTH_BYTES], "little")
    return head[LENGTH_BYTES:] == b"{" and size <= MAX_HEADER_BYTES


def read_torch_file(file: Path, entry: str | None = None) -> TorchFile:
    """A file of ``torch.save``, read without running any code.

    Args:
        file: the file.
        entry: what the weights are called in it; None looks for the usual names.

    Raises DataFormatError where code would have to run, or there are no weights.
    """
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataFormatError(_needs_code(file, error)) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataFormatError(
            f"{file} is no file of torch.save that can be read "
            f"({' '.join(str(error).split())[:200]}); expected {EXPECTED}"
        ) from error
    name, weights = _weights_in(file, content, entry)
    return TorchFile(content, name, {str(key): tensor for key, tensor in weights.items()})


def _weights_in(file: Path, content: Any, entry: str | None) -> tuple[str, Mapping[Any, Tensor]]:
    found = dict(_entries(content))
    wanted = (entry,) if entry is not None else (*ENTRIES, "")
    for name in wanted:
        if name in found:
            return name, found[name]
    held = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    lacks = f"no entry {entry!r} with tensors by name" if entry else "no tensors by name"
    others = ", ".join(name for name in found if name)
    way_out = f"; --entry takes one of: {others}" if others else ""
    raise DataFormatError(
        f"{file} gives no weights: it has {lacks}; it holds {held[:200]}{way_out}"
    )


def _entries(content: Any) -> Iterator[tuple[str, dict[Any, Tensor]]]:
    """Tensors by name, in each entry that holds some, and at the top, which has an empty name."""
    if not isinstance(content, Mapping):
        return
    for name, value in [*content.items(), ("", content)]:
        if isinstance(value, Mapping):
            tensors = {key: one for key, one in value.items() if isinstance(one, Tensor)}
            if tensors and all(isinstance(key, str) for key in tensors):
                yield str(name), tensors


def _needs_code(file: Path, error: Exception) -> str:
    named = GLOBAL.search(str(error))
    what = f"{named[1]}, which is code" if named else "more than tensors and numbers"
    return (
        f"{file} holds {what}: reading it could run anything, so it is refused; where you trust "
        f"it, save model.state_dict() alone with torch.save, or as safetensors, and take that"
    )


def _of_ours(place: Path, file: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint or of a bundle."""
    manifest: Any = read_json(place / MANIFEST_NAME)
    with shape_expected(place / MANIFEST_NAME):
        wanted = manifest["files"].get(MODEL_NAME, {}).get("sha256")
    if wanted is None:
        return load_weights(place)
    content, digest = read_file(file, ALGORITHM)
    if digest != f"{ALGORITHM}:{wanted}":
        raise DataFormatError(
            f"{file} was changed: the bundle's manifest says its sha256 is {wanted}, found {digest}"
        )
    return parse_tensors(content, str(file))
