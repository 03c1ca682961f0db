"""A run's folder as it was at one moment, while others go on writing it.

Every file is linked, which takes no room, and keeps its bytes where it is deleted or replaced
meanwhile. The folder is looked at before and after: where the two looks agree, it was just that in
between. Files that only grow may have grown; a beginning of them is as good.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.training.errors import StorageError
from holdfast.training.runs.durable_json import storage_error

logger = logging.getLogger(__name__)

MAX_LOOKS = 50
GROWING = ("losses", "logs", "tensorboard")
"""Folders of files that are appended to."""
LEASES = ("lease", ".engine/lease")
"""Of these, the newest file counts."""
OWN = (".staging", ".engine/.staging")
Identity = tuple[int, int, int]
"""Inode, size and time of the last change."""


@dataclass(frozen=True)
class Image:
    """Linked files by their paths in the run's folder.

    Attributes:
        links: where the bytes are, until the image is dropped.
        identities: equal for a file that is the same as in another image.
    """

    folder: Path
    links: Mapping[str, Path]
    identities: Mapping[str, Identity]

    def drop(self) -> None:
        """Take the links away."""
        shutil.rmtree(self.folder, ignore_errors=True)


def look_at(folder: Path) -> dict[str, Identity]:
    """All files of a run that belong into the bucket. Raises StorageError.

    Links, devices and the like are left out, as are files on their way and older leases.
    """
    found: dict[str, Identity] = {}
    try:
        for path, status in _files(folder, ""):
            found[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise storage_error("look at", folder, error) from error
    for lease in LEASES:
        older = sorted(path for path in found if path.rpartition("/")[0] == lease)[:-1]
        for path in older:
            del found[path]
    return found


def take_image(folder: Path, place: Path) -> Image:
    """Link the files of ``folder`` below ``place``, which must lie in the same file system.

    Raises StorageError where the folder cannot be read, or is never the same twice.
    """
    for attempt in range(MAX_LOOKS):
        before = look_at(folder)
        links = _linked(folder, before, place)
        if links is not None and _is_same(before, look_at(folder)):
            return Image(place, links, before)
        time.sleep(0.002 * attempt)
    shutil.rmtree(place, ignore_errors=True)
    raise StorageError(f"{folder} changes so fast that it was not the same twice; tried again soon")


def is_growing(path: str) -> bool:
    """Whether a file is one that is appended to."""
    return path.partition("/")[0] in GROWING


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        path = f"{prefix}{entry.name}"
        if path in OWN or (entry.name.startswith(".") and path != ".engine"):
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _files(Path(entry.path), f"{path}/")
        elif stat.S_ISREG(status.st_mode):
            yield path, status


def _linked(folder: Path, found: Mapping[str, Identity], place: Path) -> dict[str, Path] | None:
    """Links to all files; None where one of them is gone."""
    shutil.rmtree(place, ignore_errors=True)
    links = {}
    try:
        place.mkdir(parents=True)
        for number, path in enumerate(found):
            links[path] = place / str(number)
            os.link(folder / path, links[path], follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("link", folder, error) from error
    return links


def _is_same(before: Mapping[str, Identity], after: Mapping[str, Identity]) -> bool:
    if before.keys() != after.keys():
        return False
    return all(
        before[path][0] == after[path][0] if is_growing(path) else before[path] == after[path]
        for path in before
        if path.rpartition("/")[0] not in LEASES  # a renewal is a change of time
    )
