"""What the checkpoints of a run will cost, before there is one."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdfast.training.checkpointing.policy import CheckpointInfo, KeepCrossing, build_retention
from holdfast.training.configuration.schema import RunConfig, SelectionConfig
from holdfast.training.preemption.notices import grace_warning
from holdfast.training.rehearsal.captured import Captured
from holdfast.training.rehearsal.findings import Severity

PROBE_BYTES = 16 * 2**20
MAX_EPOCHS = 10_000


@dataclass(frozen=True)
class CheckpointCost:
    """Figures about the checkpoints of a run.

    Attributes:
        num_full, num_weights: how many the retention keeps at most, in full and slimmed.
        kept_bytes: of these together, and of the one that is being written.
        save_s: writing and reading back one, on the disk of the store.
    """

    checkpoint_bytes: int
    weights_bytes: int
    num_full: int
    num_weights: int
    kept_bytes: int
    free_bytes: int
    save_s: float
    grace_period_s: float

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def checkpoint_cost(
    captured: Captured, config: RunConfig, num_steps: int, store: Path
) -> CheckpointCost:
    """The cost of a run's checkpoints in a store, which need not be there yet."""
    folder = next(path for path in (store, *store.parents) if path.is_dir())
    num_full, num_weights = num_kept(config, num_steps)
    whole, weights = captured.num_bytes, captured.num_weights_bytes
    return CheckpointCost(
        checkpoint_bytes=whole,
        weights_bytes=weights,
        num_full=num_full,
        num_weights=num_weights,
        kept_bytes=(num_full + 1) * whole + num_weights * weights,
        free_bytes=shutil.disk_usage(folder).free,
        save_s=round(_save_s(whole, folder), 3),
        grace_period_s=config.preemption.grace_period_s,
    )


def cost_findings(cost: CheckpointCost, step_s: float) -> Iterator[tuple[Severity, str]]:
    """What is too much."""
    room = "make room, name another --store, or keep fewer"
    keys = "checkpoint.keep_last, selection.top_k"
    if 2 * cost.checkpoint_bytes > cost.free_bytes:
        yield (
            "error",
            f"two checkpoints need {2 * cost.checkpoint_bytes:,} bytes, and the store has "
            f"{cost.free_bytes:,} free: {room}",
        )
    elif cost.kept_bytes > cost.free_bytes:
        yield (
            "note",
            f"the checkpoints that are kept will need {cost.kept_bytes:,} bytes, and the store "
            f"has {cost.free_bytes:,} free: {room} ({keys})",
        )
    warning = grace_warning(grace_period_s=cost.grace_period_s, step_s=step_s, save_s=cost.save_s)
    if warning is not None:
        yield "note", warning


def num_kept(config: RunConfig, num_steps: int) -> tuple[int, int]:
    """How many checkpoints the retention keeps at most: in full, and for their weights."""
    num_epochs = min(config.train.num_epochs, MAX_EPOCHS)
    steps = [max(1, (epoch + 1) * num_steps // num_epochs) for epoch in range(num_epochs)]
    # The first epochs are the best ones: then no checkpoint is kept for two reasons.
    infos = [
        CheckpointInfo(step, epoch + 1, metrics=_ever_worse(config.selection, epoch))
        for epoch, step in enumerate(dict.fromkeys(steps))
        if (epoch + 1) % config.checkpoint.every_epochs == 0
    ]
    full: set[int] = set()
    weights: set[int] = set()
    num_unknown = 0
    for policy in build_retention(config.checkpoint, config.selection, config.ema):
        (full if policy.needs == "full" else weights).update(policy.keep(infos))
        num_unknown += int(isinstance(policy, KeepCrossing))
    return max(len(full), 1) + num_unknown, len(weights - full)


def _ever_worse(selection: SelectionConfig, epoch: int) -> dict[str, float]:
    rankings = (selection.ranking, selection.top_k_ranking)
    return {metric: epoch if mode == "min" else -epoch for metric, mode in rankings}


def _save_s(num_bytes: int, folder: Path) -> float:
    """Seconds to write so many bytes durably and to read them back, from a small probe."""
    size = max(1, min(num_bytes, PROBE_BYTES))
    start_s = time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:  # without a name: nothing can be left
            probe.write(os.urandom(size))
            probe.flush()
            os.fsync(probe.fileno())
            probe.seek(0)
            probe.read()
    except OSError:
        return 0.0  # the stage itself says why it cannot write there
    return (time.monotonic() - start_s) * num_bytes / size
