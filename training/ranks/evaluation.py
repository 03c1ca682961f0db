"""Validation by all ranks: each scores some batches, and the records are those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from holdfast.training.distributed.stopping import AgreedMonitor
from holdfast.training.distributed.world import World
from holdfast.training.experiment.protocol import Records, concatenate
from holdfast.training.loop.evaluation import evaluate, metrics_of
from holdfast.training.loop.trainer import Trainer


def measured_together(trainer: Trainer, world: World) -> dict[str, float] | None:
    """Collective. Validation metrics, the same for all ranks; None where any has a notice.

    Batch k is scored by rank k modulo the number of ranks. The metrics are computed by rank 0, of
    the records of all samples in the order of the data set.
    """
    batch_size = trainer.config.data.evaluation_batch_size
    monitor = trainer.monitor
    assert isinstance(monitor, AgreedMonitor)

    spread = trainer.state.spread

    def should_stop() -> bool:
        world.beat()
        return spread is None and monitor.has_any()  # with slices, each batch needs all ranks

    def scored(share: tuple[int, int]) -> Records | None:
        with world.lost_ranks_found():
            return evaluate(
                trainer.experiment,
                trainer.state.model,
                trainer.validation,
                batch_size=batch_size,
                should_stop=should_stop,
                share=share,
            )

    own = scored((world.rank, world.size))
    num_batches = -(-len(trainer.validation) // batch_size)
    if spread is not None and world.rank >= num_batches % world.size > 0:
        scored((0, num_batches))  # along with the ranks that have a batch more
    if spread is not None:
        spread.end_scoring()
    world.beat()
    if world.is_any(own is None):
        monitor.agree()
        return None
    assert own is not None
    records = gathered_records(world, own, len(trainer.validation), batch_size)
    metrics = None if records is None else metrics_of(trainer.experiment, records)
    told: dict[str, float] = world.from_first(metrics)
    return told


def gathered_records(
    world: World, own: Records, num_samples: int, batch_size: int
) -> Records | None:
    """Collective. The records of all ranks in the order of the data set; for rank 0 alone."""
    if world.size == 1:
        return own
    content = torch.frombuffer(bytearray(save({**own})), dtype=torch.uint8) if own else None
    sizes: list[int] = world.gathered(0 if content is None else content.numel())
    if world.rank > 0:
        if content is not None:
            world.send(content, 0)
        return None
    parts = [own]
    for rank, size in enumerate(sizes[1:], 1):
        received: Any = load(world.receive(size, rank).numpy().tobytes()) if size else {}
        parts.append(received)
    return in_order(parts, num_samples, batch_size)


def in_order(parts: Sequence[Records], num_samples: int, batch_size: int) -> Records:
    """The records of batches that were dealt out in turn, put together again."""
    starts = np.zeros(len(parts), dtype=np.int64)
    batches = []
    for number, first in enumerate(range(0, num_samples, batch_size)):
        rank = number % len(parts)
        start, end = starts[rank], starts[rank] + min(batch_size, num_samples - first)
        batches.append({name: rows[start:end] for name, rows in parts[rank].items()})
        starts[rank] = end
    return concatenate(batches)
