"""Loaders of a run, without the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from holdfast.training.own_loop.loader import RunLoader, build_loader

PLAIN: dict[str, Any] = {
    "batch_size": 4,
    "drop_last": False,
    "num_workers": 0,
    "prefetch_factor": 2,
    "collate_fn": None,
    "worker_init_fn": None,
    "pin_memory": False,
    "seed": 1,
}


class WithinStep:
    """Every call stands within a step of the run."""

    def require_step(self, what: str) -> None:
        pass

    def steps_of_epoch(self, num_steps: int) -> Iterator[int]:
        return iter(range(num_steps))


def loader_of(dataset: Any, **changed: Any) -> RunLoader:
    """What ``run.loader`` makes of a data set."""
    return build_loader(WithinStep(), dataset, **{**PLAIN, **changed})
