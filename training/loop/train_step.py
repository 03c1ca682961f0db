"""One optimizer step: forward and backward of its microbatches, clipping, update, averages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from holdfast.training.configuration.schema import TrainConfig
from holdfast.training.data.loader import Microbatch
from holdfast.training.errors import ConfigError, ExperimentError, NonFiniteLossError
from holdfast.training.experiment.protocol import Experiment
from holdfast.training.loop.evaluation import move
from holdfast.training.loop.state import TrainState

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to train on. Raises ConfigError where a GPU is asked for and there is none."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda', but torch finds no GPU; use 'auto' or 'cpu'")
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)


def gradient_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """A loss scaler, which is active for fp16 only."""
    if config.precision == "fp16" and device.type != "cuda":
        raise ConfigError("train.precision = 'fp16' needs a GPU; use 'bf16' or 'fp32' on a CPU")
    return torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")


class LossGuard:
    """Finds the first loss that is NaN or infinite.

    On the CPU it does so at once. On a GPU, where looking would stall the queue at every step, the
    place is noted on the device and read by ``check``.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_immediate = device.type == "cpu"
        self._first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)

    def observe(self, loss: Tensor, step: int, batch: int) -> None:
        """Look at the loss of a microbatch of step ``step``, which is batch ``batch``."""
        if self._is_immediate:
            if not math.isfinite(loss.item()):
                _raise_non_finite(loss.item(), step, batch)
            return
        place = torch.tensor([step, batch]).to(loss.device, non_blocking=True)
        is_first = (self._first_bad[0] < 0) & ~torch.isfinite(loss)
        self._first_bad = torch.where(is_first, place, self._first_bad)

    def check(self) -> None:
        """Raise NonFiniteLossError if a loss was not finite. Waits for the GPU."""
        if not self._is_immediate and (place := self._first_bad.tolist())[0] >= 0:
            _raise_non_finite(math.nan, *place)


class TrainStep:
    """Does the arithmetic of steps on a TrainState."""

    def __init__(
        self, experiment: Experiment, config: TrainConfig, state: TrainState, device: torch.device
    ) -> None:
        self.guard = LossGuard(device)
        self.last_loss = torch.zeros((), device=device)
        self._experiment = experiment
        self._config = config
        self._state = state
        self._device = device

    def __call__(self, microbatches: Iterable[Microbatch]) -> None:
        """Do one step and move the counters on.

        Raises:
            NonFiniteLossError: before the weights were changed (CPU), or at the next ``check``.
        """
        state = self._state
        state.optimizer.zero_grad(set_to_none=True)
        losses = [self._backward(microbatch) for microbatch in microbatches]
        self.last_loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if self._config.clip_norm is not None:
            state.gradient_scaler.unscale_(state.optimizer)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), self._config.clip_norm)
        state.gradient_scaler.step(state.optimizer)
        state.gradient_scaler.update()
        state.loss_sum += self.last_loss
        counters = state.counters
        state.counters = replace(
            counters, step=counters.step + 1, step_in_epoch=counters.step_in_epoch + 1
        )
        state.averages.update(state.model, state.counters.step)
        state.schedule.after_step()

    def _backward(self, microbatch: Microbatch) -> Tensor:
        """This microbatch's part of the step's loss, after its gradients were added."""
        batch = move(microbatch.batch, self._device)
        with self._autocast():
            loss = self._experiment.loss(self._state.model, batch)
        self._check(loss)
        self.guard.observe(loss.detach(), self._state.counters.step + 1, microbatch.step_in_epoch)
        if microbatch.num_in_step > 1:
            loss = loss * microbatch.weight
        self._state.gradient_scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _check(self, loss: object) -> None:
        method = f"{type(self._experiment).__name__}.loss"
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ExperimentError(
                f"{method} must return a scalar tensor, the mean over the batch; "
                f"it returned {shape}"
            )
        if not loss.requires_grad:
            raise ExperimentError(
                f"{method} must return a loss that has a gradient; it returned one that is cut "
                f"off from the model's parameters: leave out .detach(), .item(), torch.no_grad() "
                f"and new tensors made of numbers, and let some parameters require gradients"
            )

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = AUTOCAST_TYPES.get(self._config.precision)
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)


def _raise_non_finite(loss: float, step: int, batch: int) -> None:
    raise NonFiniteLossError(
        f"the loss of step {step} (batch {batch} of its epoch) is {loss}; nothing was saved since "
        f"the last checkpoint: lower the learning rate, clip gradients, or check the data",
        step=step,
        batch=batch,
    )
