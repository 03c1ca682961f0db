"""Reading checkpoints: every byte is verified before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.training.checkpointing.json_state import decode
from holdfast.training.checkpointing.layouts import all_laid_out
from holdfast.training.checkpointing.manifest import (
    MIGRATIONS,
    STATE_NAME,
    TENSOR_SUFFIX,
    Folder,
    Manifest,
    Migration,
    local_folder,
    manifest_of,
    verified_files,
    versions_to_migrate,
)
from holdfast.training.checkpointing.policy import Kind
from holdfast.training.checkpointing.tensor_file import parse_tensors
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import CheckpointCorruptError, DataFormatError
from holdfast.training.runs.stored_json import STATE, parse_json

MODEL_NAME = f"model{TENSOR_SUFFIX}"


@dataclass(frozen=True)
class RestoredCheckpoint:
    """What a checkpoint holds, verified.

    Attributes:
        manifest: what it says of itself.
        tensors: file stem -> name -> tensor, on the CPU. Tied ones are the same tensor. The
            tensors of a file share one storage.
        state: the content of ``state.json``; None in a checkpoint of weights.
        path: where it lies.
    """

    manifest: Manifest
    tensors: dict[str, dict[str, Tensor]]
    state: Json
    path: Path


def load_checkpoint(
    folder: Folder, manifest: Manifest, migrations: Mapping[int, Migration] = MIGRATIONS
) -> RestoredCheckpoint:
    """Read a checkpoint whose manifest is known.

    Raises CheckpointCorruptError that names the file, what was expected and what was found.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    state: Json = None
    for name, parsed in parsed_files(folder, manifest):
        if name == STATE_NAME:
            state = parsed
        else:
            tensors[name.removesuffix(TENSOR_SUFFIX)] = parsed
    for version in versions_to_migrate(manifest.format_version, str(folder.path), migrations):
        tensors, state = migrations[version].state((tensors, state))
    return RestoredCheckpoint(manifest, tensors, state, folder.path)


def parsed_files(folder: Folder, manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """The name and the content of each listed file, once verified: tensors by name, or JSON.

    Raises CheckpointCorruptError that names the file, what was expected and what was found.
    """
    if manifest.kind == "full" and STATE_NAME not in manifest.files:
        raise CheckpointCorruptError(f"{folder.path} is full and lists no {STATE_NAME}")
    for name, content in verified_files(folder, manifest):
        path = str(folder.path / name)
        is_state = name == STATE_NAME
        yield name, _parse_state(content, path) if is_state else parse_tensors(content, path)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The model's tensors alone, verified; tied ones are the same tensor under each name.

    Raises CheckpointCorruptError that names what is wrong, or StorageError.
    """
    return load_parts(folder, (MODEL_NAME,), kind="weights").tensors["model"]


def load_parts(folder: Path, names: Sequence[str], kind: Kind = "full") -> RestoredCheckpoint:
    """Some files of a checkpoint, verified; the others are not looked at.

    Raises CheckpointCorruptError that names what is wrong, or StorageError.
    """
    found = local_folder(folder)
    manifest = manifest_of(found)
    for name in names:
        if name not in manifest.files:
            raise CheckpointCorruptError(f"{folder} holds no {name}, only {sorted(manifest.files)}")
    wanted = {name: manifest.files[name] for name in names}
    part = manifest.model_copy(update={"kind": kind, "files": wanted})
    return load_checkpoint(found, part)


def load_state_part(folder: Path, name: str) -> Any:
    """One entry of a full checkpoint's state, with its tensors; nothing else is used.

    Raises CheckpointCorruptError that names what is wrong, or StorageError.
    """
    restored = load_parts(folder, (STATE_NAME, f"state{TENSOR_SUFFIX}"))
    state: Any = restored.state
    strides = state.get("layouts", {}).get("state", {})
    return decode(state[name], all_laid_out(restored.tensors["state"], strides))


def _parse_state(content: Tensor, path: str) -> Json:
    try:
        return parse_json(content.numpy().tobytes(), path, STATE)
    except DataFormatError as error:
        raise CheckpointCorruptError(str(error)) from error
