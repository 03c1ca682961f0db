"""How a run stands that a machine waits for, by the run's own records: it may have no note."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from holdfast.training.errors import InputError
from holdfast.training.runs.directory import RunRecord, has_ended, read_run_record
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.tiers.scratch import run_name
from holdfast.training.tiers.viewing import refresh_view


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes:
        name: of the run, ``experiment/run_id``.
        is_trained: whether its last segment has completed.
        max_machines: that it was begun with.
    """

    name: str
    is_trained: bool
    max_machines: int


def standing_of(store: Path | Address, reference: str) -> Standing | None:
    """How the run stands that is called ``run_id`` or ``experiment/run_id``; None before it begins.

    Raises InputError where several experiments have one of that id, DataFormatError where its
    ``run.json`` is damaged, and StorageError.
    """
    folder = store if isinstance(store, Path) else refresh_view(store, reference, is_listed=True)
    pattern = f"*/{glob.escape(reference)}"
    paths = [folder / reference] if "/" in reference else sorted(folder.glob(pattern))
    runs = [run for run in map(RunDirectory, paths) if run.run_json.is_file()]
    if len(runs) > 1:
        names = ", ".join(map(run_name, runs))
        raise InputError(f"run {reference!r} is ambiguous: {names}; name one of them in full")
    for run in runs:
        return Standing(run_name(run), has_ended(run), _max_machines(read_run_record(run)))
    return None


def _max_machines(record: RunRecord) -> int:
    """As configured; 1 for a script's run, and one of an earlier version."""
    distributed = record.config.get("distributed")
    return int(distributed.get("max_machines", 1)) if isinstance(distributed, dict) else 1
