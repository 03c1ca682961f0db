"""One step in the hands of an experiment's ``training_step``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from holdfast.training.configuration.loading import nearest
from holdfast.training.data.loader import Microbatch
from holdfast.training.errors import ExperimentError
from holdfast.training.exactness.seeding import derive_seed
from holdfast.training.experiment.protocol import WeightedBatch
from holdfast.training.loop.evaluation import move
from holdfast.training.loop.loss_guard import LossGuard
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.updates import Closure, Updates


class OwnStep:
    """What ``holdfast.Step`` promises; ends with ``finish``."""

    def __init__(
        self,
        updates: Updates,
        state: TrainState,
        guard: LossGuard,
        microbatches: Sequence[Microbatch],
        device: torch.device,
        seed: int,
    ) -> None:
        self.microbatches = tuple(
            WeightedBatch(move(microbatch.batch, device), microbatch.weight)
            for microbatch in microbatches
        )
        self.epoch = microbatches[0].epoch
        self.step = state.counters.step
        self.seed = derive_seed(seed, "step", self.epoch, self.step)
        self._step_in_epoch = microbatches[0].step_in_epoch
        self._updates = updates
        self._state = state
        self._guard = guard
        self._is_scale_used = False

    def autocast(self) -> AbstractContextManager[object]:
        """What forward and loss are computed in."""
        return self._updates.autocast()

    def backward(
        self, loss: Tensor, name: str | None = None, *, retain_graph: bool = False
    ) -> None:
        """Add the gradients of a loss. Raises NonFiniteLossError before it does, on a CPU."""
        self.finish()
        self.observe(loss, "step.backward() takes")
        named = None if name is None else self._named(name)
        self._updates.backward(loss, named, retain_graph=retain_graph)

    def update(self, name: str | None = None, closure: Closure | None = None) -> Any:
        """Clip, step with one optimizer, and clear the gradients of what it trains."""
        name = self._named(name)
        result = self._updates.update(name, closure)
        self._state.optimizers[name].zero_grad(set_to_none=True)
        self._is_scale_used = True
        return result

    def observe(self, loss: object, told: str) -> Tensor:
        """Look at a loss, and return it without its history."""
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ExperimentError(f"{told} a scalar tensor, a loss; found {found}")
        self._guard.observe(loss.detach(), self.step + 1, self._step_in_epoch)
        return loss.detach()

    def finish(self) -> None:
        """Let the scale of fp16 follow what the updates since the last backward have found."""
        if self._is_scale_used:
            self._state.gradient_scaler.update()
        self._is_scale_used = False

    def _named(self, name: str | None) -> str:
        names = [*self._state.optimizers]
        if name is None:
            if len(names) > 1:
                told = f"update() must name one of several optimizers: {', '.join(names)}"
                raise ExperimentError(told)
            return names[0]
        if name not in names or not name:
            known = nearest(name, names) if any(names) else "the configured one has no name"
            raise ExperimentError(f"there is no optimizer {name!r} to update; {known}")
        return name
