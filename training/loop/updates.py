"""From a loss to new weights: autocast, backward, clipping, update; whoever computes the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.configuration.schema import TrainConfig
from holdfast.training.distributed.row_norm import RowNorm
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.loop.state import TrainState
from holdfast.training.optimizers.building import CONFIGURED, parameters_of
from holdfast.training.optimizers.optimizer_state import join_optimizer

logger = logging.getLogger(__name__)

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Closure = Callable[[], Any]


class Updates:
    """What steps do to the weights of a TrainState."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        device: torch.device,
        norm: RowNorm | None = None,
    ) -> None:
        """``norm`` clips gradients, where torch's own function does not."""
        self._norm = norm
        self._config = config
        self._state = state
        self._device = device
        self._frozen: list[tuple[str, nn.Parameter]] | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """What forward and loss are computed in."""
        dtype = AUTOCAST_TYPES.get(self._config.precision)
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    def backward(
        self, loss: Tensor, name: str | None = None, *, retain_graph: bool = False
    ) -> None:
        """Add the gradients of a loss; of what one optimizer trains alone, where it is named."""
        inputs = None if name is None else parameters_of(self._state.optimizers[name])
        scaled: Any = self._state.gradient_scaler.scale(loss)
        scaled.backward(inputs=inputs, retain_graph=retain_graph)

    def update(self, name: str, closure: Closure | None = None) -> Any:
        """Clip and step with one optimizer. Returns what it returns."""
        optimizer, scaler = self._state.optimizers[name], self._state.gradient_scaler
        self._take_unfrozen()
        if closure is not None:
            if scaler.is_enabled():
                raise ConfigError(
                    "train.precision = 'fp16' scales the loss, and an update with a closure cannot "
                    "undo it: use 'bf16' or 'fp32'"
                )
            return optimizer.step(self._gradients_of(closure, name))
        if self._config.clip_norm is not None:
            scaler.unscale_(optimizer)
            self._clip(name, self._config.clip_norm)
        return scaler.step(optimizer)

    def _gradients_of(self, closure: Closure, name: str) -> Closure:
        """A closure that begins without gradients, and ends with clipped ones."""

        def computed() -> Any:
            self._state.optimizers[name].zero_grad(set_to_none=True)
            loss = closure()
            if self._config.clip_norm is not None:
                self._clip(name, self._config.clip_norm)
            return loss

        return computed

    def _take_unfrozen(self) -> None:
        """Let the optimizer train parameters that were frozen so far, and are not any more."""
        if self._frozen is None:
            optimizers = self._state.optimizers.values()
            known = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
            named = self._state.model.named_parameters()
            self._frozen = [(name, p) for name, p in named if id(p) not in known]
        joining = [(name, p) for name, p in self._frozen if p.requires_grad]
        for name, parameter in joining:
            step = self._state.counters.step + 1
            join_optimizer(self._joined(name, step), parameter)
            logger.info("%s was frozen, and is trained from step %d on", name, step)
        if joining:
            self._frozen = [(name, p) for name, p in self._frozen if not p.requires_grad]

    def _joined(self, parameter: str, step: int) -> Optimizer:
        """The optimizer that a parameter joins: the configured one, where it has one group."""
        optimizer = self._state.optimizers.get(CONFIGURED)
        if optimizer is None or len(optimizer.param_groups) > 1:
            raise ExperimentError(
                f"{parameter} was frozen when the optimizer was built, is not any more in step "
                f"{step}, and belongs to no group: list it in optimizers() or parameter_groups() "
                f"from the start, frozen or not"
            )
        return optimizer

    def _clip(self, name: str, max_norm: float) -> None:
        parameters = list(self._state.model.parameters())
        if name != CONFIGURED:
            own = {id(parameter) for parameter in parameters_of(self._state.optimizers[name])}
            parameters = [parameter for parameter in parameters if id(parameter) in own]
        if self._norm is not None:
            self._norm.clip(parameters, max_norm)
            return
        try:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        except RuntimeError as error:
            named = self._state.model.named_parameters()
            sparse = [n for n, p in named if p.grad is not None and p.grad.is_sparse]
            if not sparse:
                raise
            raise ConfigError(
                f"train.clip_norm = {max_norm} does not know sparse gradients, and that of "
                f"{sparse[0]} is sparse: leave train.clip_norm out, or build the layer with "
                f"sparse=False"
            ) from error
