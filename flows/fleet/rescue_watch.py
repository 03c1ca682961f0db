"""What the rescuer has watched without a gap: how long something has not changed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from holdfast.flows.fleet.rescue_policy import EngineSighting
from holdfast.tasks.engine_lease import read_engine
from holdfast.training.errors import StorageError
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.runs.lease import LeaseView, read_lease


@dataclass
class Watches:
    """Since when each watched thing has had its present value. Forgetting is always safe."""

    _seen: dict[Hashable, tuple[Hashable, float]] = field(default_factory=dict)

    def unchanged_s(self, thing: Hashable, value: Hashable, now_s: float) -> float:
        """Seconds since ``thing`` was first seen with this value; 0 at the first sight."""
        before = self._seen.get(thing)
        if before is None or before[0] != value:
            self._seen[thing] = (value, now_s)
            return 0.0
        return now_s - before[1]

    def forget(self) -> None:
        """Begin all watches anew: there was a gap in which anything may have changed."""
        self._seen.clear()

    def forget_about(self, subject: Hashable) -> None:
        """Begin the watches anew whose thing is a tuple that starts with ``subject``."""
        self._seen = {
            thing: seen
            for thing, seen in self._seen.items()
            if not (isinstance(thing, tuple) and thing[0] == subject)
        }

    def keep_only(self, subjects: set[Hashable]) -> None:
        """Drop the watches of all other subjects, so that memory does not grow."""
        self._seen = {
            thing: seen
            for thing, seen in self._seen.items()
            if isinstance(thing, tuple) and thing[0] in subjects
        }


def see_engine(
    watches: Watches, run: RunDirectory, flow_run_id: str, run_count: int, now_s: float
) -> EngineSighting | None:
    """The engine of a flow run's present attempt; None where it has none, or cannot be seen."""
    try:
        found = read_engine(run)
        if found is None:
            return None
        view, holder = found
        if (holder.flow_run_id, holder.run_count) != (flow_run_id, run_count):
            return None  # of an earlier attempt: the present one has not begun its work yet
        return EngineSighting(
            status=view.status,
            unchanged_s=_lease_unchanged_s(watches, (flow_run_id, "engine"), view, now_s),
            ttl_s=view.ttl_s,
            is_run_written=_is_written(watches, run, flow_run_id, now_s),
        )
    except (StorageError, OSError, ValueError):
        # A store that does not answer, or may not be entered, says nothing about who lives.
        watches.forget_about(flow_run_id)
        return None


def _is_written(watches: Watches, run: RunDirectory, flow_run_id: str, now_s: float) -> bool:
    lease = read_lease(run)
    if lease is None or lease.status in ("released", "gone"):
        return False
    return _lease_unchanged_s(watches, (flow_run_id, "run"), lease, now_s) <= lease.ttl_s


def _lease_unchanged_s(
    watches: Watches, thing: tuple[str, str], view: LeaseView, now_s: float
) -> float:
    # Not the status: a lease that runs out has not changed.
    return watches.unchanged_s(thing, (view.generation, view.renewed_at), now_s)
