"""One optimizer step: forward and backward of its microbatches, clipping, update, averages."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.training.checkpointing.finite import non_finite
from holdfast.training.configuration.schema import TrainConfig
from holdfast.training.data.loader import Microbatch
from holdfast.training.distributed.row_norm import RowNorm
from holdfast.training.distributed.sharded_step import ShardedStep
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.experiment.error_places import error_place
from holdfast.training.experiment.protocol import Experiment, TrainingPlace, hook
from holdfast.training.loop.evaluation import move
from holdfast.training.loop.loss_guard import LossGuard
from holdfast.training.loop.memory import tell_of_memory
from holdfast.training.loop.own_step import OwnStep
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.updates import Updates
from holdfast.training.optimizers.building import CONFIGURED

logger = logging.getLogger(__name__)

BATCH_NORM_REFUSAL = "Expected more than 1 value per channel when training"


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


class TrainStep:
    """Does the arithmetic of steps on a TrainState."""

    def __init__(
        self,
        experiment: Experiment,
        config: TrainConfig,
        state: TrainState,
        device: torch.device,
        seed: int = 0,
        shards: ShardedStep[Microbatch] | None = None,
        norm: RowNorm | None = None,
    ) -> None:
        """``seed`` is what the seeds of steps are derived from.

        ``shards`` does the shards of a step and sums them up, where the steps have shards, and
        ``norm`` clips gradients, where torch's own function does not.
        """
        self.guard = LossGuard(device, self._cause, state.watch)
        self.last_loss = torch.zeros((), device=device)
        self._experiment = experiment
        self._config = config
        self._state = state
        self._device = device
        self._seed = seed
        self._updates = Updates(config, state, device, norm)
        self._shards = shards
        self._training_step = hook(experiment, "training_step")
        if shards is not None and self._training_step is not None:
            raise ConfigError(
                f"distributed.strategy sums the gradients of loss(); "
                f"{type(experiment).__name__}.training_step does its own backward passes: leave "
                f"one of them out"
            )
        wanted = getattr(experiment, "loss", None)
        self._wants_place = wanted is not None and "at" in inspect.signature(wanted).parameters

    def __call__(self, microbatches: Iterable[Microbatch]) -> None:
        """Do one step and move the counters on.

        Raises:
            NonFiniteLossError: before the weights were changed (CPU), or at the next ``check``.
            ExperimentError: a frozen parameter that checkpoints leave out was changed.
        """
        state, number = self._state, self._state.counters.step + 1
        try:
            self._update(microbatches)
        except (MemoryError, RuntimeError) as error:
            parts = self._config.num_microbatches
            tell_of_memory(
                error,
                f"step {number}",
                f"write train.num_microbatches={2 * parts} (it is {parts}) under another run id: a "
                f"step's samples are then computed in more parts",
            )
            raise
        if state.frozen is not None:
            state.frozen.watch(number)
        self.guard.observe_step(self.last_loss, number)
        state.loss_sum += self.last_loss
        state.counters = state.counters.after_step()
        state.averages.update(state.model, number)
        state.schedule.after_step()

    def leave_out(self) -> None:
        """Count a step, and move the rate, without anything that its batch would have done."""
        state = self._state
        self.last_loss = torch.full_like(self.last_loss, torch.nan)
        state.counters = state.counters.after_step()
        state.schedule.after_step()

    def _update(self, microbatches: Iterable[Microbatch]) -> None:
        state = self._state
        for optimizer in state.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if self._training_step is not None:
            self.last_loss = self._own_step(microbatches)
            return
        if self._shards is not None:
            step = state.counters.step
            self.last_loss = self._shards(step, microbatches, self._backward).to(self._device)
        else:
            losses = [self._backward(microbatch) for microbatch in microbatches]
            self.last_loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self._updates.update(CONFIGURED)
        state.gradient_scaler.update()

    def _own_step(self, microbatches: Iterable[Microbatch]) -> Tensor:
        """Let the experiment do the step. Returns its loss."""
        step = OwnStep(
            self._updates, self._state, self.guard, [*microbatches], self._device, self._seed
        )
        loss = self._training_step(self._state.model, step)
        step.finish()
        told = f"{type(self._experiment).__name__}.training_step must return"
        return step.observe(loss, told).clone()  # its own, whatever becomes of that tensor

    def _backward(self, microbatch: Microbatch) -> Tensor:
        """This microbatch's part of the step's loss, after its gradients were added."""
        batch = move(microbatch.batch, self._device)
        with self._updates.autocast():
            loss = self._loss(batch, microbatch)
        self._check(loss)
        self.guard.observe(loss.detach(), self._state.counters.step + 1, microbatch.step_in_epoch)
        if microbatch.num_in_step > 1:
            loss = loss * microbatch.weight
        self._updates.backward(loss)
        return loss.detach()

    def _loss(self, batch: Any, microbatch: Microbatch) -> Tensor:
        loss: Callable[..., Tensor] = self._experiment.loss
        told = {"at": self._place(microbatch)} if self._wants_place else {}
        try:
            return loss(self._state.model, batch, **told)
        except ValueError as error:
            if microbatch.num_samples != 1 or BATCH_NORM_REFUSAL not in str(error):
                raise
            raise ExperimentError(
                f"step {self._state.counters.step + 1} has a microbatch of one sample, and batch "
                f"norm has no statistics of one ({error_place(error)}): write "
                f"data.should_drop_last=true, or another data.batch_size or "
                f"train.num_microbatches, under another run id"
            ) from error

    def _place(self, microbatch: Microbatch) -> TrainingPlace:
        return TrainingPlace(
            seed=self._seed,
            epoch=microbatch.epoch,
            step=self._state.counters.step,
            step_in_epoch=microbatch.step_in_epoch,
            microbatch=microbatch.number,
            num_microbatches=microbatch.num_in_step,
        )

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
