"""Find runs in a store. Reads names and JSON only."""

from __future__ import annotations

from pathlib import Path

from holdfast.training.configuration.loading import nearest
from holdfast.training.errors import InputError
from holdfast.training.runs.directory import RunDirectory

DEFAULT_STORE = "./runs"


def find_runs(store: Path) -> list[RunDirectory]:
    """All runs of a store, the newest first."""
    records = sorted(
        store.glob("*/*/run.json"), key=lambda path: (path.stat().st_mtime, path), reverse=True
    )
    return [RunDirectory(path.parent) for path in records]


def find_run(store: Path, reference: str) -> RunDirectory:
    """The run that is called ``run_id``, ``experiment/run_id``, or by its directory.

    Raises:
        InputError: there is none, or several experiments have a run of that id.
    """
    as_path = Path(reference).expanduser()
    if (as_path / "run.json").is_file():
        return RunDirectory(as_path)
    runs = find_runs(store)
    found = [run for run in runs if reference in (run.path.name, full_name(run))]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(full_name(run) for run in found)
        raise InputError(f"run {reference!r} is ambiguous: {names}; name one of them in full")
    if not runs:
        raise InputError(f"store {store} has no runs; start one with: holdfast run digits")
    raise InputError(
        f"store {store} has no run {reference!r}; {nearest(reference, map(full_name, runs[:20]))}"
    )


def full_name(run: RunDirectory) -> str:
    """``experiment/run_id``."""
    return f"{run.path.parent.name}/{run.path.name}"
