"""Finds a loss that is not finite or jumps, by the losses before it and by nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from holdfast.training.configuration.schema import SpikesConfig
from holdfast.training.errors import LossJumpError, NonFiniteLossError

BLOCK_STEPS = 256


class SpikeWatch:
    """Looks at the loss of each step that was done.

    On the CPU it does so at once. On a GPU, where looking would stall the queue, losses wait until
    ``check``, which comes before anything is made of them, or until there are many. Whenever it
    looks, the first spike is at the same step.

    The mean is one of the losses' sizes, with the same weight for each of the first
    ``spikes.window_steps`` and an exponential decay of that length from then on; it is part of the
    state. Before there are so many losses no jump is found.
    """

    def __init__(self, config: SpikesConfig, device: torch.device) -> None:
        self._config = config
        self._is_immediate = device.type == "cpu"
        self._pending: list[tuple[int, Tensor]] = []
        self._num_losses, self._mean = 0, 0.0

    def observe(self, loss: Tensor, step: int) -> None:
        """Take the loss of a step. Raises as ``check``."""
        self._pending.append((step, loss))
        if self._is_immediate or len(self._pending) >= BLOCK_STEPS:
            self.check()

    def check(self) -> None:
        """Look at all losses so far. Waits for the GPU.

        Raises NonFiniteLossError or LossJumpError, of the first spike.
        """
        if not self._pending:
            return
        steps = [step for step, _ in self._pending]
        losses = torch.stack([loss.detach().double() for _, loss in self._pending]).tolist()
        self._pending = []
        for step, loss in zip(steps, losses, strict=True):
            self._look(loss, step)

    def state(self) -> dict[str, Any]:
        """What later judgements depend on. Raises as ``check``."""
        self.check()
        return {"num_losses": self._num_losses, "mean": self._mean}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` returned."""
        self._pending = []
        self._num_losses, self._mean = state["num_losses"], state["mean"]

    def _look(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss of step {step} is {loss}", step=step, batch=-1)
        window, factor = self._config.window_steps, self._config.max_jump
        if factor is not None and self._num_losses >= window and abs(loss) > factor * self._mean:
            raise LossJumpError(
                f"the loss of step {step} is {loss:.6g}, {abs(loss) / self._mean:.1f} times the "
                f"mean of those before, {self._mean:.6g}"
                if self._mean
                else f"the loss of step {step} is {loss:.6g}, and those before were 0",
                step=step,
                loss=loss,
            )
        self._num_losses += 1
        self._mean += (abs(loss) - self._mean) / min(self._num_losses, window)
