"""``manifest.json``: what a checkpoint holds.

The manifest is written last, so a folder with one is complete. It names each file's size and
digest, and ends with a digest of its own fields, so that a changed digit is found in it as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from holdfast.training.checkpointing.digests import ALGORITHM, HASHERS, digest_of
from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.policy import CheckpointInfo, Kind, Trigger
from holdfast.training.configuration.schema import Json
from holdfast.training.device.reading import DeviceReader
from holdfast.training.errors import CheckpointCorruptError
from holdfast.training.runs.durable_json import json_bytes, storage_error, without_nan
from holdfast.training.runs.paths import SLICED_NAME, parse_step
from holdfast.training.runs.stored_json import parse_json

FORMAT_VERSION = 1
SLICED_VERSION = 2
"""Of checkpoints that hold slices; there is nothing else in which they differ."""
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_STEP = 10**15
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
TENSOR_SUFFIX = ".safetensors"
DIGEST_KEY = "manifest_digest"

Size = Annotated[int, Field(ge=0)]
StateParts = tuple[dict[str, dict[str, Tensor]], Json]


@dataclass(frozen=True)
class Migration:
    """How a checkpoint of one format version becomes one of the next.

    Attributes:
        manifest: takes and returns the manifest's fields.
        state: takes and returns (tensors by file stem and name, content of state.json).
    """

    manifest: Callable[[dict[str, Any]], dict[str, Any]]
    state: Callable[[StateParts], StateParts]


MIGRATIONS: dict[int, Migration] = {}
"""By the version that they read. Version 1 is the first, so there are none yet."""


class FileEntry(BaseModel):
    """Size and digest of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int = Field(ge=0)
    digest: str = Field(pattern=rf"^({'|'.join(HASHERS)}):[0-9a-f]+$")


class Manifest(BaseModel):
    """What a checkpoint holds, what made it, and how good it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    """Of the files as they lie on the disk."""
    step: int = Field(ge=0, le=MAX_STEP)
    epoch: int = Field(ge=0, le=MAX_STEP)
    kind: Kind = "full"
    trigger: Trigger
    metrics: dict[str, float] = Field(default_factory=dict)
    files: dict[str, FileEntry]
    config_digest: str
    config: dict[str, Any] = Field(default_factory=dict)
    """The values that the digest covers, so that a mismatch can be told by its keys."""
    run: str = ""
    """The run that it belongs to, wherever it is copied to."""
    versions: dict[str, str] = Field(default_factory=dict)
    device: str
    created_at: str
    segment: int
    shapes: dict[str, dict[str, tuple[Size, ...]]] = Field(default_factory=dict)
    """By file stem and name, of all tensors whose slices lie in several files."""

    @field_validator("files")
    @classmethod
    def _known_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not is_known_file(name) or name == MANIFEST_NAME:
                raise ValueError(f"a checkpoint does not hold a file {name!r}")
        return files

    @property
    def info(self) -> CheckpointInfo:
        """What retention needs to know."""
        return CheckpointInfo(self.step, self.epoch, self.kind, self.trigger, self.metrics)

    def files_of(self, part: str) -> list[str]:
        """What there is of a part: one file of this name, or those of its slices, or nothing."""
        return [name for name in sorted(self.files) if part_name(name) == part]

    def digest_of(self, part: str) -> str:
        """Says which bytes a part has: its file's digest, or one of those of its slices' files."""
        return joint_digest({name: self.files[name].digest for name in self.files_of(part)})

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``."""
        absent = None if self.shapes else {"shapes"}
        fields = without_nan(self.model_dump(mode="python", exclude=absent))
        return json_bytes({**fields, DIGEST_KEY: digest_of([json_bytes(fields)])})


def part_name(file: str) -> str:
    """``model.safetensors``, of which ``model-00001-of-00003.safetensors`` holds slices."""
    sliced = SLICED_NAME.fullmatch(file)
    return file if sliced is None else f"{sliced['stem']}{TENSOR_SUFFIX}"


def joint_digest(digests: Mapping[str, str]) -> str:
    """The digest of one file, or one of the names and digests of several."""
    first = next(iter(digests.values()))
    if len(digests) == 1:
        return first
    lines = [f"{name} {digest}\n".encode() for name, digest in sorted(digests.items())]
    return digest_of(lines, first.partition(":")[0])


def is_known_file(name: str) -> bool:
    """Whether a checkpoint may hold such a file: a plain name of a kind that we read."""
    is_plain = "/" not in name and "\\" not in name and not name.startswith(".")
    return is_plain and (
        name in (MANIFEST_NAME, STATE_NAME)
        or (name.endswith(TENSOR_SUFFIX) and name != TENSOR_SUFFIX)
    )


@dataclass(frozen=True)
class Folder:
    """A folder of files that may be a checkpoint.

    Attributes:
        path: where it is, for messages.
        files: names of what is in it.
        read: (file, digest algorithm, size in bytes or None) -> (content as uint8, its digest).
            Raises CheckpointCorruptError if there is no plain file of that size, or StorageError.
    """

    path: Path
    files: frozenset[str]
    read: Callable[[str, str, int | None], tuple[Tensor, str]]


def local_folder(path: Path) -> Folder:
    """A folder on a disk. One that is missing, a file or a link, is a folder without files."""
    if path.is_symlink():
        return Folder(path, frozenset(), lambda *_: _refuse_link(path))
    try:
        files = frozenset(entry.name for entry in path.iterdir())
    except (NotADirectoryError, FileNotFoundError):
        files = frozenset()
    except OSError as error:
        raise storage_error("list", path, error) from error
    return Folder(path, files, partial(read_of_checkpoint, path))


def read_of_checkpoint(
    folder: Path,
    file: str,
    algorithm: str,
    size_bytes: int | None,
    on_bytes: Callable[[int], None] | None = None,
    device: DeviceReader | None = None,
) -> tuple[Tensor, str]:
    """As ``read_file``; a file whose size nothing tells is a manifest, and small."""
    max_bytes = MAX_MANIFEST_BYTES if size_bytes is None else None
    return read_file(folder / file, algorithm, size_bytes, on_bytes, max_bytes, device)


def _refuse_link(path: Path) -> NoReturn:
    raise CheckpointCorruptError(f"{path} is a link, expected a folder: nothing behind it is read")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; its files are not looked at.

    Raises CheckpointCorruptError that names what is wrong, or StorageError.
    """
    return manifest_of(local_folder(folder))


def verify(folder: Path) -> Manifest:
    """Read every byte of a checkpoint and compare it with the manifest, which is returned.

    Raises CheckpointCorruptError that names the file, what was expected and what was found.
    """
    found = local_folder(folder)
    manifest = manifest_of(found)
    for _ in verified_files(found, manifest):
        pass
    return manifest


def manifest_of(folder: Folder, migrations: Mapping[int, Migration] = MIGRATIONS) -> Manifest:
    """As ``read_manifest``, for a folder of any storage."""
    content, _ = folder.read(MANIFEST_NAME, ALGORITHM, None)
    path = folder.path / MANIFEST_NAME
    manifest = parse_manifest(content.numpy().tobytes(), str(path), migrations)
    step = parse_step(folder.path.name)
    if step is not None and step != manifest.step:
        raise CheckpointCorruptError(f"{path} is of step {manifest.step}, not of {step}")
    return manifest


def manifest_digest(folder: Folder) -> str:
    """What tells a checkpoint apart from every other one of its run, of the same step too.

    Raises what ``manifest_of`` raises.
    """
    return hashlib.sha256(manifest_of(folder).to_bytes()).hexdigest()


def verified_files(folder: Folder, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """The name and the content, uint8, of each file that the manifest lists, once it is verified.

    Files that a checkpoint may hold and the manifest does not list are left over from slimming.

    Raises CheckpointCorruptError that names the file, what was expected and what was found.
    """
    check_names(folder)
    for name, entry in sorted(manifest.files.items()):
        algorithm = entry.digest.partition(":")[0]
        content, digest = folder.read(name, algorithm, entry.size_bytes)
        if digest != entry.digest:
            raise CheckpointCorruptError(
                f"{folder.path / name} was changed: the manifest says its digest is "
                f"{entry.digest}, found {digest}"
            )
        yield name, content


def check_names(folder: Folder) -> None:
    """Raise CheckpointCorruptError that names a file which is no checkpoint's; none is opened."""
    for name in sorted(folder.files):
        if not is_known_file(name) and not name.startswith("."):
            raise CheckpointCorruptError(
                f"{folder.path / name} is not a file of a checkpoint: move it away"
            )


def parse_manifest(
    content: bytes, path: str, migrations: Mapping[int, Migration] = MIGRATIONS
) -> Manifest:
    """The manifest that a file holds, brought to the current format.

    Args:
        content: of ``manifest.json``.
        path: where it lies, for messages.
        migrations: from older formats.

    Raises:
        CheckpointCorruptError: it is not a manifest, it was changed, or its format is not known.
    """
    try:
        fields: Any = parse_json(content, path)
        digest = str(fields.pop(DIGEST_KEY))
        found = digest_of([json_bytes(fields)], digest.partition(":")[0])
        version = int(fields["format_version"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} is not a manifest: {error!r}") from error
    if digest != found:
        raise CheckpointCorruptError(
            f"{path} was changed: it says its digest is {digest}, found {found}"
        )
    for number in versions_to_migrate(version, path, migrations):
        fields = migrations[number].manifest(fields)
    try:
        return Manifest.model_validate({**fields, "format_version": version})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointCorruptError(
            f"{path}: {place}: {first['msg']}, found {first['input']!r:.200}"
        ) from error


def versions_to_migrate(
    version: int, path: str, migrations: Mapping[int, Migration] = MIGRATIONS
) -> range:
    """The versions whose migrations lead to the current one, in order.

    Raises CheckpointCorruptError if one is missing.
    """
    wanted = range(version, FORMAT_VERSION)
    if version > SLICED_VERSION or any(number not in migrations for number in wanted):
        known = sorted({*migrations, FORMAT_VERSION, SLICED_VERSION})
        raise CheckpointCorruptError(
            f"{path} has format version {version}, this Holdfast reads {known}: use the Holdfast "
            f"that wrote it, or a newer"
        )
    return wanted
