"""One optimizer step: forward and backward of its microbatches, clipping, update, averages."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.training.checkpointing.finite import non_finite
from holdfast.training.configuration.schema import TrainConfig
from holdfast.training.data.loader import Microbatch
from holdfast.training.errors import ConfigError, ExperimentError, NonFiniteLossError
from holdfast.training.experiment.error_places import error_place
from holdfast.training.experiment.protocol import Experiment
from holdfast.training.loop.evaluation import move
from holdfast.training.loop.memory import memory_errors_told
from holdfast.training.loop.state import TrainState
from holdfast.training.optimizers.optimizer_state import join_optimizer

logger = logging.getLogger(__name__)

BATCH_NORM_REFUSAL = "Expected more than 1 value per channel when training"
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

    def __init__(self, device: torch.device, explain: Callable[[], str] = lambda: "") -> None:
        """``explain`` tells what may have made a loss so, before the step changes anything."""
        self._explain = explain
        self._is_immediate = device.type == "cpu"
        self._first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)

    def observe(self, loss: Tensor, step: int, batch: int) -> None:
        """Look at the loss of a microbatch of step ``step``, which is batch ``batch``."""
        if self._is_immediate:
            if not math.isfinite(loss.item()):
                _raise_non_finite(loss.item(), step, batch, self._explain())
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
        self.guard = LossGuard(device, self._cause)
        self.last_loss = torch.zeros((), device=device)
        self._experiment = experiment
        self._config = config
        self._state = state
        self._device = device
        self._frozen: list[tuple[str, nn.Parameter]] | None = None

    def __call__(self, microbatches: Iterable[Microbatch]) -> None:
        """Do one step and move the counters on.

        Raises:
            NonFiniteLossError: before the weights were changed (CPU), or at the next ``check``.
        """
        state, counters = self._state, self._state.counters
        parts = self._config.num_microbatches
        with memory_errors_told(
            f"step {counters.step + 1}",
            f"write train.num_microbatches={2 * parts} (it is {parts}) under another run id: a "
            f"step's samples are then computed in more parts",
        ):
            self._update(microbatches)
        state.loss_sum += self.last_loss
        state.counters = replace(
            counters, step=counters.step + 1, step_in_epoch=counters.step_in_epoch + 1
        )
        state.averages.update(state.model, state.counters.step)
        state.schedule.after_step()

    def _update(self, microbatches: Iterable[Microbatch]) -> None:
        state = self._state
        state.optimizer.zero_grad(set_to_none=True)
        losses = [self._backward(microbatch) for microbatch in microbatches]
        self.last_loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self._take_unfrozen()
        if self._config.clip_norm is not None:
            state.gradient_scaler.unscale_(state.optimizer)
            self._clip(self._config.clip_norm)
        state.gradient_scaler.step(state.optimizer)
        state.gradient_scaler.update()

    def _take_unfrozen(self) -> None:
        """Let the optimizer train parameters that were frozen so far, and are not any more."""
        model, optimizer = self._state.model, self._state.optimizer
        if self._frozen is None:
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = model.named_parameters()
            self._frozen = [(name, p) for name, p in named if id(p) not in known]
        joining = [(name, p) for name, p in self._frozen if p.requires_grad]
        for name, parameter in joining:
            join_optimizer(optimizer, parameter)
            step = self._state.counters.step + 1
            logger.info("%s was frozen, and is trained from step %d on", name, step)
        if joining:
            self._frozen = [(name, p) for name, p in self._frozen if not p.requires_grad]

    def _clip(self, max_norm: float) -> None:
        parameters = dict(self._state.model.named_parameters())
        try:
            torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
        except RuntimeError as error:
            sparse = [n for n, p in parameters.items() if p.grad is not None and p.grad.is_sparse]
            if not sparse:
                raise
            raise ConfigError(
                f"train.clip_norm = {max_norm} does not know sparse gradients, and that of "
                f"{sparse[0]} is sparse: leave train.clip_norm out, or build the layer with "
                f"sparse=False"
            ) from error

    def _backward(self, microbatch: Microbatch) -> Tensor:
        """This microbatch's part of the step's loss, after its gradients were added."""
        batch = move(microbatch.batch, self._device)
        with self._autocast():
            loss = self._loss(batch, microbatch.num_samples)
        self._check(loss)
        self.guard.observe(loss.detach(), self._state.counters.step + 1, microbatch.step_in_epoch)
        if microbatch.num_in_step > 1:
            loss = loss * microbatch.weight
        self._state.gradient_scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, batch: Any, num_samples: int) -> Tensor:
        try:
            return self._experiment.loss(self._state.model, batch)
        except ValueError as error:
            if num_samples != 1 or BATCH_NORM_REFUSAL not in str(error):
                raise
            raise ExperimentError(
                f"step {self._state.counters.step + 1} has a microbatch of one sample, and batch "
                f"norm has no statistics of one ({error_place(error)}): write "
                f"data.should_drop_last=true, or another data.batch_size or "
                f"train.num_microbatches, under another run id"
            ) from error

    def _cause(self) -> str:
        bad = non_finite(dict(self._state.model.named_parameters()))
        if not bad:
            return "the weights were finite: it is this batch's data, or its forward pass"
        return f"{bad[0]} was not finite before it: a gradient of an earlier step was not"

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


def _raise_non_finite(loss: float, step: int, batch: int, cause: str = "") -> None:
    told = f"; {cause}" if cause else ""
    raise NonFiniteLossError(
        f"the loss of step {step} (batch {batch} of its epoch) is {loss}{told}; nothing was saved "
        f"since the last checkpoint: lower the learning rate, clip gradients, or check the data",
        step=step,
        batch=batch,
    )
