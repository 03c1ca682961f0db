"""Reading checkpoints: every byte is verified before it is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.training.checkpointing.json_state import decode
from holdfast.training.checkpointing.manifest import (
    MIGRATIONS,
    STATE_NAME,
    TENSOR_SUFFIX,
    FileEntry,
    Folder,
    Manifest,
    Migration,
    local_folder,
    manifest_of,
    part_name,
    read_of_checkpoint,
    verified_files,
    versions_to_migrate,
)
from holdfast.training.checkpointing.model_weights import all_laid_out
from holdfast.training.checkpointing.policy import Kind
from holdfast.training.checkpointing.slices import WHOLE, Assembly, Slicing, files_of_own
from holdfast.training.checkpointing.tensor_file import parse_layout, parse_tensors
from holdfast.training.configuration.schema import Json
from holdfast.training.device.reading import DeviceReader
from holdfast.training.errors import CheckpointCorruptError, DataFormatError
from holdfast.training.runs.stored_json import STATE, parse_json

logger = logging.getLogger(__name__)

MODEL_NAME = f"model{TENSOR_SUFFIX}"
GENERATORS_NAME = f"state{TENSOR_SUFFIX}"
"""Its tensors are needed in this machine's memory."""


@dataclass(frozen=True)
class RestoredCheckpoint:
    """What a checkpoint holds, verified.

    Attributes:
        manifest: what it says of itself.
        tensors: file stem -> name -> tensor, on the CPU or where they were read to. Tied ones are
            the same tensor. The tensors of a file share one storage.
        state: the content of ``state.json``; None in a checkpoint of weights.
        path: where it lies.
    """

    manifest: Manifest
    tensors: dict[str, dict[str, Tensor]]
    state: Json
    path: Path


def load_checkpoint(
    folder: Folder,
    manifest: Manifest,
    migrations: Mapping[int, Migration] = MIGRATIONS,
    slicing: Slicing = WHOLE,
    *,
    only_own: bool = False,
    device: DeviceReader | None = None,
) -> RestoredCheckpoint:
    """Read a checkpoint whose manifest is known.

    Of tensors that lie in slices those are taken that ``slicing`` asks for, out of one file after
    the other. With ``only_own``, where another process has verified all files, those are left out
    of which nothing is taken. Tensors that lie in no slices are read to ``device``, where all fit.

    Raises CheckpointCorruptError that names the file, what was expected and what was found.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    state: Json = None
    slices = Assembly(manifest.shapes, slicing, only_own=only_own)
    read = files_of_own(folder.path, manifest, slicing) if only_own else manifest
    if device is not None and device.has_room(sum(f.size_bytes for f in manifest.files.values())):
        folder = _on_device(folder, manifest, device)
    for name, parsed in parsed_files(folder, read, slices):
        if name == STATE_NAME:
            state = parsed
        else:
            tensors[name.removesuffix(TENSOR_SUFFIX)] = parsed
    tensors |= slices.tensors()
    for version in versions_to_migrate(manifest.format_version, str(folder.path), migrations):
        tensors, state = migrations[version].state((tensors, state))
    return RestoredCheckpoint(manifest, tensors, state, folder.path)


def parsed_files(
    folder: Folder, manifest: Manifest, slices: Assembly | None = None
) -> Iterator[tuple[str, Any]]:
    """The name and the content of each listed file, once verified: tensors by name, or JSON.

    Files of slices go to ``slices``, and must hold each tensor once.

    Raises CheckpointCorruptError that names the file, what was expected and what was found.
    """
    slices = slices or Assembly(manifest.shapes, None)
    if manifest.kind == "full" and STATE_NAME not in manifest.files:
        raise CheckpointCorruptError(f"{folder.path} is full and lists no {STATE_NAME}")
    for name, content in verified_files(folder, manifest):
        path = str(folder.path / name)
        if name == STATE_NAME:
            yield name, _parse_state(content, path)
        elif (part := part_name(name)) == name:
            yield name, parse_tensors(content, path)
        else:
            stem = part.removesuffix(TENSOR_SUFFIX)
            slices.take(stem, *parse_layout(content.numpy().data, path), path)
    slices.require_whole(folder.path)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The model's tensors alone, verified; tied ones are the same tensor under each name.

    Raises CheckpointCorruptError that names what is wrong, or StorageError.
    """
    return load_parts(folder, (MODEL_NAME,), kind="weights").tensors["model"]


def load_parts(folder: Path, names: Sequence[str], kind: Kind = "full") -> RestoredCheckpoint:
    """Some files of a checkpoint, verified; the others are not looked at.

    The name of a file stands for those of slices that there are in its place.

    Raises CheckpointCorruptError that names what is wrong, or StorageError.
    """
    found = local_folder(folder)
    manifest = manifest_of(found)
    wanted: dict[str, FileEntry] = {}
    for name in names:
        files = manifest.files_of(name)
        if not files:
            raise CheckpointCorruptError(f"{folder} holds no {name}, only {sorted(manifest.files)}")
        wanted |= {file: manifest.files[file] for file in files}
    shapes = {stem: s for stem, s in manifest.shapes.items() if f"{stem}{TENSOR_SUFFIX}" in names}
    part = manifest.model_copy(update={"kind": kind, "files": wanted, "shapes": shapes})
    return load_checkpoint(found, part)


def load_state_part(folder: Path, name: str) -> Any:
    """One entry of a full checkpoint's state, with its tensors; nothing else is used.

    Raises CheckpointCorruptError that names what is wrong, or StorageError.
    """
    restored = load_parts(folder, (STATE_NAME, GENERATORS_NAME))
    state: Any = restored.state
    strides = state.get("layouts", {}).get("state", {})
    return decode(state[name], all_laid_out(restored.tensors["state"], strides))


def _on_device(folder: Folder, manifest: Manifest, device: DeviceReader) -> Folder:
    """The folder, of which most files are read to a device; to memory where that goes wrong."""

    def read(name: str, algorithm: str, size_bytes: int | None) -> tuple[Tensor, str]:
        if name in (STATE_NAME, GENERATORS_NAME) or part_name(name) != name:
            return folder.read(name, algorithm, size_bytes)
        problem = "it gives other bytes back than it was given"
        try:
            content, digest = read_of_checkpoint(
                folder.path, name, algorithm, size_bytes, device=device
            )
        except RuntimeError as error:  # torch's
            problem = " ".join(str(error).split())
        else:
            if digest == manifest.files[name].digest:
                return content, digest
        content, digest = folder.read(name, algorithm, size_bytes)
        if digest == manifest.files[name].digest:
            logger.warning(
                "%s is read to memory first, not to the device: %s", folder.path / name, problem
            )
        return content, digest

    return replace(folder, read=read)


def _parse_state(content: Tensor, path: str) -> Json:
    try:
        return parse_json(content.numpy().tobytes(), path, STATE)
    except DataFormatError as error:
        raise CheckpointCorruptError(str(error)) from error
