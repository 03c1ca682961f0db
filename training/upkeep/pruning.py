"""Delete from a store what a rule lets go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.training.errors import HoldfastError, LeaseHeldError, RunConflictError
from holdfast.training.tiers.scratch import address_of
from holdfast.training.upkeep.plan import Rule, StoredRun, StoredVersion, plan_pruning
from holdfast.training.upkeep.shelves import FolderShelf, Shelf


@dataclass(frozen=True)
class Gone:
    """One run or bundle that was deleted, or would be.

    Attributes:
        num_bytes: that it had; None where nothing was deleted.
        age_s: seconds since it was changed.
    """

    name: str
    age_s: float
    num_bytes: int | None = None


@dataclass(frozen=True)
class Pruned:
    """What became of a store.

    Attributes:
        gone: runs, then bundles.
        kept: of what stays, why, by name.
        failed: of what could not be deleted, why, by name; it is there as it was.
        num_leftovers, leftover_bytes: of dead writers.
        unseen: what of theirs could not be looked for, and why; empty for nothing.
    """

    gone: tuple[Gone, ...]
    kept: Mapping[str, str]
    failed: Mapping[str, str]
    num_leftovers: int
    leftover_bytes: int
    unseen: str = ""

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "gone": [vars(one) for one in self.gone],
            "kept": dict(self.kept),
            "failed": dict(self.failed),
            "num_leftovers": self.num_leftovers,
            "leftover_bytes": self.leftover_bytes,
            "unseen": self.unseen,
        }


def open_shelf(store: Path) -> Shelf:
    """A store: a folder, or the bucket that the folder is a tier of. Raises InputError."""
    address = address_of(store)
    if address is None:
        return FolderShelf(store)
    from holdfast.training.upkeep.bucket_shelf import BucketShelf

    return BucketShelf(address)


def prune(shelf: Shelf, rule: Rule, *, is_dry_run: bool = False) -> Pruned:
    """Delete what the rule lets go, one after the other; with ``is_dry_run`` only say what.

    Bundles before runs: what an alias came to stand for meanwhile keeps its run. A run that
    somebody begins to write meanwhile stays, and is among the ``kept``.

    Raises StorageError where the store cannot be read, InputError where there is none.
    """
    now_s = shelf.now_s()
    plan = plan_pruning(shelf.runs(), shelf.versions(), rule, now_s)
    kept, failed, gone = dict(plan.kept), {}, []
    doomed: tuple[StoredRun | StoredVersion, ...] = (*plan.versions, *plan.runs)
    for one in doomed:
        name = one.name if isinstance(one, StoredRun) else str(one)
        try:
            num_bytes = None if is_dry_run else shelf.remove(one)
        except (LeaseHeldError, RunConflictError) as error:
            kept[name] = str(error)
        except HoldfastError as error:
            failed[name] = str(error)
        else:
            gone.append(Gone(name, now_s - one.changed_s, num_bytes))
    num_leftovers, leftover_bytes = shelf.sweep(is_dry_run=is_dry_run)
    return Pruned(tuple(gone), kept, failed, num_leftovers, leftover_bytes, shelf.unseen)
