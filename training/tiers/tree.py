"""All files of a run at one moment, as the bucket has them: paths, sizes, digests and keys.

A tree is an object that never changes; the head names the one that counts. Small files stand in it
with their bytes, so that the records of a run are read with one request.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.training.errors import DataFormatError
from holdfast.training.runs.paths import parse_step
from holdfast.training.runs.stored_json import (
    Kinds,
    Limits,
    parse_json,
    required_fields,
    shape_expected,
)

FORMAT_VERSION = 1
INLINE_BYTES = 16 * 1024
MAX_FILES = 100_000
LIMITS = Limits(max_bytes=2**28, max_depth=6)
DIGEST = re.compile(r"blake3:[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9_=+@.,-]{1,255}")
FIELDS: Kinds = {"format_version": (int,), "files": (dict,)}
FILE: Kinds = {
    "size_bytes": (int,),
    "digest": (str,),
    "key": (str, type(None)),
    "text": (str, type(None)),
    "base64": (str, type(None)),
}


@dataclass(frozen=True)
class TreeFile:
    """One file.

    Attributes:
        key: of the object that holds its bytes; empty where they are ``inline``.
    """

    size_bytes: int
    digest: str
    key: str = ""
    inline: bytes = b""

    def as_json(self) -> dict[str, Any]:
        """The file's entry in the tree."""
        entry: dict[str, Any] = {"size_bytes": self.size_bytes, "digest": self.digest}
        if self.key:
            return {**entry, "key": self.key}
        try:
            return {**entry, "text": self.inline.decode()}
        except UnicodeDecodeError:
            return {**entry, "base64": base64.b64encode(self.inline).decode()}


@dataclass(frozen=True)
class Tree:
    """The files of a run by their paths in its folder, with ``/``."""

    files: Mapping[str, TreeFile] = field(default_factory=dict)

    def keys(self) -> set[str]:
        """Of all objects that it needs."""
        return {file.key for file in self.files.values() if file.key}

    def to_bytes(self) -> bytes:
        """As it is stored; the same files give the same bytes."""
        told = {path: file.as_json() for path, file in sorted(self.files.items())}
        value = {"format_version": FORMAT_VERSION, "files": told}
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def has_checkpoints(paths: Iterable[str]) -> bool:
    """Whether one of a run's files belongs to a checkpoint."""
    return any(path.startswith("checkpoints/") for path in paths)


def newest_steps(tree: Tree) -> list[int]:
    """The steps of the checkpoints that a tree holds, the newest last."""
    names = {path.split("/")[1] for path in tree.files if path.startswith("checkpoints/")}
    return sorted(step for name in names if (step := parse_step(name)) is not None)


def all_paths(_path: str) -> bool:
    """Whether a file is wanted: each one is."""
    return True


def parse_tree(
    content: bytes, source: str, folder: str, takes: Callable[[str], bool] = all_paths
) -> Tree:
    """The tree that bytes hold.

    Args:
        content: from the bucket, where a stranger may have put it.
        source: what it is called in messages.
        folder: of keys; none may lie elsewhere.
        takes: which files are wanted; the others are left out, and not looked at.

    Raises DataFormatError that says what is wrong with it.
    """
    if len(content) > LIMITS.max_bytes:
        raise DataFormatError(f"{source} has {len(content):,} bytes; it was not made by Holdfast")
    value = required_fields(parse_json(content, source, LIMITS), source, FIELDS)
    if value["format_version"] != FORMAT_VERSION:
        raise DataFormatError(
            f"{source} has format version {value['format_version']}, this Holdfast reads "
            f"{FORMAT_VERSION}: use the Holdfast that wrote it, or a newer one"
        )
    if len(value["files"]) > MAX_FILES:
        raise DataFormatError(f"{source} names {len(value['files']):,} files")
    files = {
        path: _file(path, entry, source, folder)
        for path, entry in value["files"].items()
        if takes(path)
    }
    _require_no_file_in_a_file(files, source)
    return Tree(files)


def _file(path: str, entry: Any, source: str, folder: str) -> TreeFile:
    _require_path(path, source)
    told = required_fields(entry, f"{source}, {path}", FILE)
    inline = b""
    with shape_expected(source):
        if told.get("text") is not None:
            inline = told["text"].encode()
        elif told.get("base64") is not None:
            inline = base64.b64decode(told["base64"], validate=True)
    key = told.get("key") or ""
    if key:
        _require_path(key, source)
    is_good = (
        DIGEST.fullmatch(told["digest"]) is not None
        and told["size_bytes"] >= 0
        and (key.startswith(f"{folder}/") if key else len(inline) == told["size_bytes"])
    )
    if not is_good:
        raise DataFormatError(f"{source} does not say where {path} lies; it was changed")
    return TreeFile(told["size_bytes"], told["digest"], key, inline)


def _require_path(path: str, source: str) -> None:
    """A path within a folder, and nothing that leads out of it."""
    parts = path.split("/")
    if any(NAME.fullmatch(part) is None or set(part) == {"."} for part in parts):
        raise DataFormatError(f"{source} names {path!r:.200}, which is no path of a run's file")


def _require_no_file_in_a_file(files: Mapping[str, TreeFile], source: str) -> None:
    for path in files:
        parts = path.split("/")
        for length in range(1, len(parts)):
            if "/".join(parts[:length]) in files:
                raise DataFormatError(f"{source} names {path!r:.200}, which lies within a file")
