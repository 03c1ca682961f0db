"""Looking at the checkpoints of a run from outside: what there is, and whether its bytes are good.

Nothing is written. A training may go on meanwhile: what it slims is looked at again, and what it
prunes is not missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from holdfast.training.checkpointing.loading import parsed_files
from holdfast.training.checkpointing.manager import DAMAGED
from holdfast.training.checkpointing.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_names,
    local_folder,
    manifest_of,
    read_of_checkpoint,
)
from holdfast.training.checkpointing.storage import LocalReader
from holdfast.training.errors import CheckpointCorruptError, InputError, StorageError
from holdfast.training.runs.paths import RunDirectory, parse_step

Condition = Literal["good", "damaged", "set aside", "unreadable"]
EXPECTED = "a run (STORE/EXPERIMENT/RUN_ID), its checkpoints folder, or one checkpoint"


@dataclass(frozen=True)
class Inspection:
    """One checkpoint, or a damaged one that a restore has set aside.

    Attributes:
        path: its folder.
        size_bytes: of all files in it.
        manifest: what it says of itself; None where that cannot be read.
        error: what is wrong with it, as far as it was looked at.
        is_latest: whether a restore would begin with it: the newest that is full.
    """

    path: Path
    size_bytes: int
    manifest: Manifest | None = None
    error: CheckpointCorruptError | StorageError | None = None
    is_latest: bool = False

    @property
    def condition(self) -> Condition:
        """In a word. What was set aside is no checkpoint of the run any more."""
        if DAMAGED in self.path.name:
            return "set aside"
        if isinstance(self.error, StorageError):
            return "unreadable"
        return "good" if self.error is None else "damaged"

    @property
    def step(self) -> int | None:
        """From the manifest, or else from the folder's name."""
        return self.manifest.step if self.manifest is not None else _step(self.path)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        told = ("epoch", "kind", "trigger", "metrics", "created_at", "segment")
        return {
            "path": str(self.path),
            "step": self.step,
            "condition": self.condition,
            "problem": str(self.error) if self.error is not None else None,
            "is_latest": self.is_latest,
            "size_bytes": self.size_bytes,
            **{name: getattr(self.manifest, name, None) for name in told},
        }


def find_checkpoints(place: Path) -> list[Path]:
    """The checkpoints of a run, of a checkpoints folder, or the one that is named; by step.

    Damaged ones that were set aside are among them. Empty for a run that has none yet.

    Raises:
        InputError: there is nothing of this kind; says what was expected and what was found.
        StorageError: the folder cannot be listed.
    """
    if not place.exists():
        raise InputError(f"{place} does not exist; expected {EXPECTED}")
    if _step(place) is not None or (place / MANIFEST_NAME).exists():
        return [place]
    if not place.is_dir():
        raise InputError(f"{place} is a file; expected {EXPECTED}")
    run = RunDirectory(place)
    is_run = run.run_json.exists() or run.checkpoints.is_dir()
    folder = run.checkpoints if is_run else place
    names = LocalReader(folder).names()
    found = [folder / name for name in names if _step(Path(name)) is not None]
    if not found and not is_run and place.name != run.checkpoints.name:
        inside = ", ".join(names[:5]) or "nothing"
        raise InputError(f"{place} holds {inside}; expected {EXPECTED}")
    return sorted(found, key=lambda path: (_step(path), path.name))


def inspect(places: Iterable[Path]) -> list[Inspection]:
    """What the manifests of these checkpoints say; no other file is read.

    The newest full one is marked as the latest.
    """
    found = [seen for seen in map(_inspect, places) if seen.path.exists()]
    full = [
        seen
        for seen in found
        if seen.condition == "good" and seen.manifest is not None and seen.manifest.kind == "full"
    ]
    latest = max(full, key=lambda seen: seen.step or 0, default=None)
    return [replace(seen, is_latest=seen is latest) for seen in found]


def verify_all(
    places: Iterable[Path], on_bytes: Callable[[int], None] = lambda _: None
) -> Iterator[Inspection]:
    """Read every byte of these checkpoints; each is given back as soon as it is known.

    Memory stays small however large a file is. One that training prunes meanwhile is left out.

    Args:
        places: the folders.
        on_bytes: told the size of each chunk that was read.
    """
    for path in places:
        seen = _verify(path, on_bytes)
        if path.exists():
            yield seen


def the_checkpoint(place: Path) -> Path:
    """The checkpoint that is named, or the newest of a run: a full one where there is one.

    Raises InputError where there is none whose manifest can be read, or StorageError.
    """
    candidates = inspect(find_checkpoints(place))
    if [seen.path for seen in candidates] == [place]:
        return place
    readable = [seen for seen in candidates if seen.condition == "good"]
    if not readable:
        raise InputError(f"{place} has no checkpoint that can be read; expected one at least")
    return max(readable, key=lambda seen: (seen.is_latest, seen.step or 0)).path


def _step(path: Path) -> int | None:
    return parse_step(path.name.partition(DAMAGED)[0])


def _inspect(path: Path) -> Inspection:
    seen = Inspection(path, _size_bytes(path))
    try:
        folder = local_folder(path)
        manifest = manifest_of(folder)
        told_bytes = sum(entry.size_bytes for entry in manifest.files.values())
        # Of a run that was read from a bucket, its records alone are here.
        seen = replace(seen, manifest=manifest, size_bytes=max(seen.size_bytes, told_bytes))
        check_names(folder)
    except (CheckpointCorruptError, StorageError) as error:
        return replace(seen, error=error)
    return seen


def _verify(path: Path, on_bytes: Callable[[int], None]) -> Inspection:
    while True:
        seen = _inspect(path)
        try:
            folder = replace(
                local_folder(path),
                read=partial(read_of_checkpoint, path, on_bytes=on_bytes),
            )
            for _ in parsed_files(folder, manifest_of(folder)):
                pass
        except (CheckpointCorruptError, StorageError) as error:
            # Slimming replaces the manifest before it takes files away.
            if seen.manifest == _inspect(path).manifest:
                return replace(seen, error=error)
        else:
            return seen


def _size_bytes(path: Path) -> int:
    try:
        files = list(path.iterdir()) if path.is_dir() else [path]
        return sum(file.lstat().st_size for file in files if not file.is_dir())
    except OSError:  # pruned meanwhile, or not ours to read: the manifest will say so
        return 0
