"""A script's run that goes on with another configuration, because somebody asked for it."""

from __future__ import annotations

from holdfast.training.runs.directory import (
    RunDirectory,
    RunRecord,
    TakenOver,
    conflicts,
    utc_now,
)
from holdfast.training.runs.fenced import publish_json
from holdfast.training.runs.lease import Lease

OF_THE_SCRIPT = ("config", "config_digest", "seeds", "experiment_digest", "script")


def take_over(
    run: RunDirectory, lease: Lease, existing: RunRecord, here: RunRecord, place: tuple[int, int]
) -> RunRecord:
    """Let ``run.json`` have the configuration of ``here``, and tell of the one before; the record.

    Nothing is written where both describe the same run. ``place``: the segment that goes on, and
    the step that it goes on from. Raises StorageError, or LeaseLostError.
    """
    differing = list(conflicts(existing, here))
    if not differing:
        return existing
    before = TakenOver(
        segment=place[0],
        step=place[1],
        at=utc_now(),
        config_digest=existing.config_digest,
        changed={key: there for key, there, _ in differing},
    )
    changed = {name: getattr(here, name) for name in OF_THE_SCRIPT}
    changed["taken_over"] = [*existing.taken_over, before]
    record = existing.model_copy(update=changed)
    publish_json(lease, run.run_json, record.model_dump(mode="json"))
    return record
