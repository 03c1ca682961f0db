"""Find runs in a store. Reads names and JSON only."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from shlex import quote

from holdfast.tasks.preflight import store_path
from holdfast.training.configuration.loading import nearest
from holdfast.training.errors import InputError, StorageError
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.runs.shown_text import shown
from holdfast.training.tiers.scratch import (
    address_of,
    parsed_store,
    tier_folder,
    told_store,
)
from holdfast.training.tiers.viewing import refresh_view

logger = logging.getLogger(__name__)

DEFAULT_STORE = "./runs"


def find_runs(store: Path) -> list[RunDirectory]:
    """All runs of a store, the newest first.

    A run whose folder may not be entered, or whose ``run.json`` is no plain file, is among them:
    whoever reads it is told what is wrong. Raises StorageError where the store cannot be listed.
    """
    found = [
        (changed_s, folder)
        for experiment in _folders(store)
        for folder in _folders(experiment, is_told=False)
        if not folder.name.startswith(".")  # a fork that is not whole yet
        if (changed_s := _changed_s(folder / "run.json")) is not None
    ]
    return [RunDirectory(folder) for _, folder in sorted(found, reverse=True)]


def _folders(place: Path, *, is_told: bool = True) -> list[Path]:
    """The folders in a folder; empty where there is none."""
    try:
        return [Path(entry.path) for entry in os.scandir(place) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if is_told:
            raise StorageError(f"cannot list {place}: {error.strerror}") from error
        logger.warning("left out: cannot list %s: %s", shown(place), error.strerror)
        return []


def _changed_s(path: Path) -> float | None:
    """When a file was changed, 0 where that may not be seen; None where there is none."""
    try:
        return path.lstat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return 0.0


def find_run(store: Path, reference: str) -> RunDirectory:
    """The run that is called ``run_id``, ``experiment/run_id``, or by its directory.

    Raises:
        InputError: there is none, or several experiments have a run of that id.
    """
    with suppress(OSError, ValueError, RuntimeError):  # what can be no path is a run's name
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
    told = told_store(store)
    if not runs:
        raise InputError(f"store {told} has no runs; start one with: {first_command(store)}")
    raise InputError(
        f"store {told} has no run {reference!r}; {nearest(reference, map(full_name, runs[:20]))}"
    )


def first_command(store: Path) -> str:
    """What starts a first run in a store."""
    is_default = store.absolute() == Path(DEFAULT_STORE).absolute()
    return "holdfast run digits" + ("" if is_default else f" --store {quote(told_store(store))}")


def reading_store(
    store: str,
    reference: str | None = None,
    *,
    also: tuple[str, ...] = (),
    is_fresh: bool = False,
) -> Path:
    """The folder in which a store's runs can be read, as they are now.

    Args:
        store: a path or an address.
        reference: the run that is asked for; of a bucket, the others are not read then.
        also: of a bucket, what the paths of files begin with that are wanted besides records.
        is_fresh: of a bucket, read every byte again.

    Raises InputError or StorageError.
    """
    address = parsed_store(store)
    if address is None:
        return store_path(store)
    return refresh_view(address, reference, also=also, is_fresh=is_fresh)


def written_store(run: RunDirectory) -> Path:
    """The folder in which a run that was found is written: of a bucket, not where it is read."""
    store = run.path.absolute().parent.parent
    address = address_of(store)
    return store if address is None else tier_folder(address, "work")


def full_name(run: RunDirectory) -> str:
    """``experiment/run_id``."""
    return f"{run.path.parent.name}/{run.path.name}"
