"""The state of a script's training, and where its loop stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.training.averages.ema import MovingAverages
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import InputError
from holdfast.training.exactness.strictness import warn_of_inexactness
from holdfast.training.loop.evaluation import model_device
from holdfast.training.loop.experiment_state import Stateful
from holdfast.training.loop.state import TrainState
from holdfast.training.optimizers.rate_trace import RateTrace
from holdfast.training.own_loop.kept import Kept

MAX_NAMED = 3


@dataclass
class Place:
    """Where a script's loop stands.

    Attributes:
        epoch: of ``run.epochs``.
        step: within that epoch, or of ``run.steps`` where there are no epochs.
        num_losses: how many losses the sum since the last validation has.
        is_over: the script has said that training ends, before its loop did.
        has_begun: what stands before the steps of this epoch is done.
    """

    epoch: int = 0
    step: int = 0
    num_losses: int = 0
    is_over: bool = False
    has_begun: bool = False

    def state_dict(self) -> dict[str, Any]:
        """As JSON; ``is_over`` only where it is, ``has_begun`` where no step says so."""
        found = {**vars(self), "has_begun": self.has_begun and not self.step}
        seldom = ("is_over", "has_begun")
        return {name: value for name, value in sorted(found.items()) if value or name not in seldom}


class Whole:
    """All that a checkpoint holds beside models, optimizers and averages."""

    def __init__(self, kept: Kept, loaders: Mapping[str, Stateful], place: Place) -> None:
        self._kept = kept
        self._loaders = loaders
        self._place = place

    def state_dict(self) -> dict[str, Any]:
        """What is kept beside them, and the places of loaders and loop."""
        loaders = {name: loader.state_dict() for name, loader in sorted(self._loaders.items())}
        place = self._place.state_dict()
        return {"kept": self._kept.state_dict(), "loaders": loaders, "place": place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned. Raises InputError where the script has others."""
        if state["loaders"].keys() != self._loaders.keys():
            raise InputError(
                f"the checkpoint has the places of {len(state['loaders'])} loaders, and the script "
                f"makes {len(self._loaders)} by run.loader: go on with as many"
            )
        self._kept.load_state_dict(state["kept"])
        for name, loader in self._loaders.items():
            loader.load_state_dict(state["loaders"][name])
        vars(self._place).update(state["place"])


class KeptRates:
    """Records what the rate was. The schedulers are the script's, and move when it says so."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._optimizer = next(iter(optimizers.values()), None)
        self._num_steps = 0
        self.trace = RateTrace()
        self.trace.record(0, self.rate)

    @property
    def rate(self) -> float:
        """The rate of the first optimizer's first group; 0 where there is none."""
        return 0.0 if self._optimizer is None else float(self._optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Take the rate that the next step will have."""
        self._num_steps += 1
        self.trace.record(self._num_steps, self.rate)

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, and the trace."""
        return {"num_steps": self._num_steps, "scheduler": {}, "trace": self.trace.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._num_steps = state["num_steps"]
        self.trace = RateTrace.restored(state["trace"])


class Form:
    """Names and shapes of what is kept, which a start of the script has to make as they were."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._first = self._now()
        self._has_told = False

    def tell_if_new(self) -> None:
        """Warn, once, of a form that no start of the script has: none goes on from there."""
        now = self._now()
        if self._has_told or now == self._first:
            return
        self._has_told = True
        named = sorted(name for name in now.keys() | self._first.keys() if self._is_new(name, now))
        more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        warn_of_inexactness(
            f"{', '.join(named[:MAX_NAMED])}{more} came, went, or changed in shape since training "
            f"began: a start of the script that makes them as at first cannot go on from here; "
            f"give models and optimizers their last form before run.steps or run.epochs"
        )

    def _is_new(self, name: str, now: Mapping[str, Any]) -> bool:
        return (name in now, now.get(name)) != (name in self._first, self._first.get(name))

    def _now(self) -> dict[str, Any]:
        """Shapes and types of parameters, names of buffers, and sizes of the optimizers' groups.

        A buffer takes the shape of what is loaded.
        """
        model = self._state.model
        parameters = model.named_parameters(remove_duplicate=False)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in parameters}
        groups = {
            f"group {number} of optimizer {name}".rstrip(): len(group["params"])
            for name, optimizer in self._state.optimizers.items()
            for number, group in enumerate(optimizer.param_groups)
        }
        return {**dict.fromkeys(model.state_dict()), **shapes, **groups}


def state_of(kept: Kept, config: RunConfig, whole: Whole) -> TrainState:
    """What a script keeps, as a training has it. Raises InputError where it keeps no model."""
    model: nn.Module = kept.model()
    device = model_device(model)
    optimizers = kept.named_optimizers()
    scaler = kept.scaler or torch.amp.GradScaler(device.type, enabled=False)
    return TrainState(
        model=model,
        optimizers=optimizers,
        schedule=KeptRates(optimizers),  # type: ignore[arg-type]  # all of it that a state uses
        averages=MovingAverages(model, config.ema),
        gradient_scaler=scaler,
        loss_sum=torch.zeros((), dtype=torch.float64, device=device),
        experiment=whole,
    )
