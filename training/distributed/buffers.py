"""The buffers of a model through the shards of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.errors import ExperimentError

MAX_COUNTERS = 64  # elements of a buffer of integers, such as batch norm's number of batches


class Buffers:
    """The buffers of a model, each once: what they were before the step, and how they change."""

    def __init__(self, model: nn.Module) -> None:
        slots: dict[int, tuple[str, dict[str, Any], str]] = {}
        for prefix, module in model.named_modules():
            for key, tensor in module._buffers.items():
                if tensor is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    slots.setdefault(id(tensor), (name, module._buffers, key))
        self._slots = {name: (where, key) for name, where, key in slots.values()}
        self._before: dict[str, Tensor] = {}
        self.changed: set[str] = set()

    def now(self) -> dict[str, Tensor]:
        """The buffers as they are."""
        return {name: where[key] for name, (where, key) in self._slots.items()}

    def begin(self) -> None:
        """Before the first shard of a step."""
        self._before = {name: tensor.detach().clone() for name, tensor in self.now().items()}
        self.changed = set()

    def look(self) -> None:
        """After a shard: which have changed. Raises ExperimentError for one of another kind."""
        for name, tensor in self.now().items():
            before = self._before[name]
            if not isinstance(tensor, Tensor) or tensor.shape != before.shape:
                raise ExperimentError(_kept(name, "has taken another shape"))
            if tensor.dtype != before.dtype:
                raise ExperimentError(_kept(name, f"has become {tensor.dtype}"))
            # By value: batch norm writes to its buffers without counting up their versions.
            if not torch.equal(tensor, before):
                if not (tensor.is_floating_point() or is_counter(tensor)):
                    told = "of integers has changed, which have no mean,"
                    raise ExperimentError(_kept(name, told))
                self.changed.add(name)

    def put_back(self) -> None:
        """Before the next shard: as they were before the step."""
        now = self.now()
        for name in self.changed:
            now[name].copy_(self._before[name])


def _kept(name: str, what: str) -> str:
    return (
        f"the buffer {name} {what} in a step: a buffer of a step with shards keeps its kind, and "
        f"becomes the mean over the shards; train with distributed.strategy=none"
    )


def is_counter(buffer: Tensor) -> bool:
    """Whether a buffer is of integers, and few: it has no mean, and becomes that of shard 0."""
    is_number = not buffer.is_floating_point() and not buffer.is_complex()
    return is_number and buffer.numel() <= MAX_COUNTERS
