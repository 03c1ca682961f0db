"""A store that is kept in order: what is in it, and how a part of it is taken out for good."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from holdfast.training.bundles.registry import PARTIAL, Registry
from holdfast.training.errors import LeaseHeldError, RunConflictError
from holdfast.training.runs.durable_json import storage_error, sync_folder
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.upkeep.census import (
    ENGINE,
    changed_s,
    run_folders,
    seen_run,
    seen_versions,
)
from holdfast.training.upkeep.plan import StoredRun, StoredVersion

LEASE_TTL_S = 60.0
ABANDONED_S = 24 * 3600.0
"""What was begun so long ago, and is named by nobody, was left by somebody who is dead."""
PRUNED = re.compile(r"\..{1,128}\.pruned-[0-9a-f]{16}")
HALF = re.compile(r"\.(fork-.{1,128}-[0-9a-f]{12}|.{1,128}\.copying(-lease)?)")


class Shelf(Protocol):
    """One store.

    Attributes:
        unseen: what of dead writers the last sweep could not look for, and why; empty for nothing.
    """

    unseen: str

    def now_s(self) -> float:
        """The time on the store's own clock, with which the times of its files compare."""
        ...

    def runs(self) -> list[StoredRun]:
        """All runs."""
        ...

    def versions(self) -> list[StoredVersion]:
        """All versions of all bundles."""
        ...

    def remove(self, doomed: StoredRun | StoredVersion) -> int:
        """Delete it; how many bytes that were. It is gone as a whole, or there as it was.

        Raises LeaseHeldError or RunConflictError for what is written, or was changed since it was
        seen, StorageError where it cannot be deleted.
        """
        ...

    def sweep(self, *, is_dry_run: bool) -> tuple[int, int]:
        """Delete what dead writers left; how many files or folders, and how many bytes."""
        ...


class FolderShelf:
    """A store that is a folder."""

    unseen = ""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._registry = Registry(store)

    def now_s(self) -> float:
        """As ``Shelf.now_s``; this machine's where nothing can be written."""
        probe = self._store / f".clock-{secrets.token_hex(6)}"
        try:
            probe.touch(exist_ok=False)
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):  # what could not be written need not be removed
                probe.unlink()

    def runs(self) -> list[StoredRun]:
        """As ``Shelf.runs``."""
        return [seen_run(run, changed_s(run)) for run in run_folders(self._store)]

    def versions(self) -> list[StoredVersion]:
        """As ``Shelf.versions``."""
        published_s = {
            (name, version): self._registry.bundle(name, version).lstat().st_mtime
            for name in self._registry.names()
            for version in self._registry.versions(name)
        }
        return seen_versions(self._registry, published_s)

    def remove(self, doomed: StoredRun | StoredVersion) -> int:
        """As ``Shelf.remove``: renamed out of sight first."""
        try:
            if isinstance(doomed, StoredRun):
                return _deleted(self._hidden_run(doomed))
            return _deleted(self._hidden_version(doomed))
        except OSError as error:
            if isinstance(error, LeaseHeldError):
                raise
            raise storage_error("delete", self._store, error) from error

    def _hidden_run(self, doomed: StoredRun) -> Path:
        run = RunDirectory(self._store / doomed.name)
        hidden = run.path.with_name(f".{run.path.name}.pruned-{secrets.token_hex(8)}")
        engine = RunDirectory(run.path / ENGINE)
        with Lease.acquire(engine, LEASE_TTL_S), Lease.acquire(run, LEASE_TTL_S):
            if seen_run_changed(run, doomed):
                raise RunConflictError(f"{doomed.name} was changed since it was looked at")
            run.path.rename(hidden)
            sync_folder(run.path.parent)
        return hidden

    def _hidden_version(self, doomed: StoredVersion) -> Path:
        folder = self._registry.bundle(doomed.name, doomed.version)
        hidden = folder.with_name(f".{secrets.token_hex(6)}.partial")
        folder.rename(hidden)
        sync_folder(folder.parent)
        if doomed.version in self._registry.aliases(doomed.name).values():
            hidden.rename(folder)
            raise RunConflictError(f"an alias has come to stand for {doomed}")
        return hidden

    def sweep(self, *, is_dry_run: bool) -> tuple[int, int]:
        """As ``Shelf.sweep``: runs and bundles that were on their way in or out."""
        found = list(self._leftovers())
        sizes = [_size(path) for path in found]
        for path in () if is_dry_run else found:
            _deleted(path)
        return len(found), sum(sizes)

    def _leftovers(self) -> Iterator[Path]:
        limit_s = self.now_s() - ABANDONED_S
        places = [self._store, *self._registry.folder.glob("*/versions")]
        for place in [path for store in places[:1] for path in _plain_folders(store)] + places[1:]:
            for path in _plain_folders(place, is_hidden=True):
                is_old = path.lstat().st_mtime < limit_s
                is_half = HALF.fullmatch(path.name) or PARTIAL.fullmatch(path.name)
                if PRUNED.fullmatch(path.name) or (is_half and is_old):
                    yield path


def seen_run_changed(run: RunDirectory, seen: StoredRun) -> bool:
    """Whether a run in a folder is no longer what was seen."""
    return changed_s(run) != seen.changed_s


def _plain_folders(place: Path, *, is_hidden: bool = False) -> list[Path]:
    try:
        return [
            Path(entry.path)
            for entry in os.scandir(place)
            if entry.is_dir(follow_symlinks=False) and entry.name.startswith(".") == is_hidden
        ]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _size(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


def _deleted(folder: Path) -> int:
    """Delete a folder that nobody knows any more; its bytes."""
    num_bytes = _size(folder)
    shutil.rmtree(folder, ignore_errors=True)  # what is left is hidden, and the next one's
    return num_bytes
