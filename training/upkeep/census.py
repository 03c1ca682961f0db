"""What is there in a store: its runs and bundles, as a plan needs to know them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.training.bundles.registry import Registry
from holdfast.training.errors import BundleError, HoldfastError
from holdfast.training.runs.directory import (
    ledger_outcome,
    read_run_record,
    read_segments,
    run_identity,
)
from holdfast.training.runs.lease_view import read_lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.upkeep.plan import StoredRun, StoredVersion

ENGINE = ".engine"
ENDED = ("completed", "failed")
CHANGING = ("run.json", "evaluation.json", "promotion.json", "report.html")


def run_folders(store: Path) -> list[RunDirectory]:
    """All runs of a folder; none of what is hidden, and no link."""
    found = [
        RunDirectory(Path(run.path))
        for experiment in _folders(store)
        for run in _folders(Path(experiment.path))
        if (Path(run.path) / "run.json").is_file()
    ]
    return sorted(found, key=lambda run: run.path)


def _folders(place: Path) -> list[os.DirEntry[str]]:
    try:
        entries = list(os.scandir(place))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    return [
        entry
        for entry in entries
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
    ]


def changed_s(run: RunDirectory) -> float:
    """When a run in a folder was changed last; a lease is no change."""
    paths = [run.path / name for name in CHANGING]
    paths += list(run.segments.glob("*.json")) + list(run.checkpoints.glob("*"))
    return max((path.lstat().st_mtime for path in paths if path.exists()), default=0.0)


def seen_run(run: RunDirectory, changed_at_s: float, tree: str = "") -> StoredRun:
    """A run as it is now; one that cannot be read stays."""
    name = f"{run.path.parent.name}/{run.path.name}"
    try:
        record = read_run_record(run)
        obstacle = _obstacle(run)
    except (HoldfastError, FileNotFoundError) as error:
        return StoredRun(name, changed_at_s, obstacle=f"it cannot be read: {error}", tree=tree)
    told = [record.config, record.folder, record.script.arguments if record.script else None]
    return StoredRun(
        name,
        changed_at_s,
        identity=run_identity(record),
        parent=record.lineage.run if record.lineage is not None else "",
        texts=tuple(_texts(told)),
        obstacle=obstacle,
        tree=tree,
    )


def _obstacle(run: RunDirectory) -> str:
    """Why a run must not go now; empty where it has come to its end and nobody writes it."""
    for directory in (run, RunDirectory(run.path / ENGINE)):
        lease = read_lease(directory)
        if lease is not None and lease.status == "held":
            return f"{lease.holder} writes it"
    if run.bundle.is_dir():
        return ""
    segments = read_segments(run)
    outcome = ledger_outcome(segments[-1], is_alive=False) if segments else "new"
    return "" if outcome in ENDED else f"it has not come to its end ({outcome}): resume it"


def seen_versions(
    registry: Registry, published_s: dict[tuple[str, int], float]
) -> list[StoredVersion]:
    """All versions of all bundles. Raises where an alias cannot be read: it may stand for any."""
    found = []
    for name in registry.names():
        aliases = registry.aliases(name)
        for version in registry.versions(name):
            standing = tuple(sorted(alias for alias, at in aliases.items() if at == version))
            try:
                run_id = str(registry.manifest(name, version)["run"]["run_id"])
            except (BundleError, KeyError):
                run_id = ""
            moment_s = published_s.get((name, version), 0.0)
            found.append(StoredVersion(name, version, moment_s, run_id, standing))
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
