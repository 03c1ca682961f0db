"""TrainState: all that a resume needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.averages.ema import MovingAverages
from holdfast.training.checkpointing.json_state import Tensors, decode, encode
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import CheckpointMismatchError
from holdfast.training.exactness.seeding import capture_generators, restore_generators
from holdfast.training.loop.early_stopping import EarlyStopping
from holdfast.training.loop.optimization import Schedule, capture_optimizer, restore_optimizer

MAX_DIFFERENCES_SHOWN = 3


@runtime_checkable
class Stateful(Protocol):
    """An experiment may keep state of its own; it is then part of every checkpoint."""

    def state_dict(self) -> Mapping[str, Any]:
        """JSON and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """Put back what ``state_dict`` returned."""
        ...


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch of the metrics history."""

    epoch: int
    step: int
    train_loss: float
    learning_rate: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Counters:
    """Where training stands: ``step`` optimizer steps are done, ``step_in_epoch`` of this epoch.

    The last step of an epoch leaves ``step_in_epoch`` at the epoch's length; the epoch ends, and
    the counter returns to 0, once validation is done.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


@dataclass
class TrainState:
    """Everything that changes while training, in one place.

    ``loss_sum`` is the sum of the losses of this epoch's steps, fp64 on the training device.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    averages: MovingAverages
    gradient_scaler: torch.amp.GradScaler
    loss_sum: Tensor
    experiment: object = None
    counters: Counters = field(default_factory=Counters)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    history: list[EpochRecord] = field(default_factory=list)

    def capture(self) -> tuple[dict[str, Tensors], Json]:
        """Tensors by file stem, and the JSON of ``state.json``. The tensors are live, not copies.

        Raises:
            UnsupportedStateError: a component's state is neither tensors nor JSON.
        """
        state_tensors: Tensors = dict(capture_generators())
        model_tensors, model_extra = _split_tensors(self.model.state_dict())
        optimizer_tensors, optimizer_state = capture_optimizer(self.optimizer, self.model)
        components = {
            "scheduler": self.schedule.state_dict(),
            "gradient_scaler": self.gradient_scaler.state_dict(),
            "early_stopping": asdict(self.early_stopping),
            "counters": asdict(self.counters),
            "history": [asdict(record) for record in self.history],
            "loss_sum": self.loss_sum,
            "ema": self.averages.state(),
            "experiment": self._experiment_state(),
            "model": model_extra,
        }
        state = {name: encode(value, name, state_tensors) for name, value in components.items()}
        tensors = {
            "model": model_tensors,
            "optimizer": optimizer_tensors,
            "ema": self.averages.tensors(),
            "state": state_tensors,
        }
        return tensors, {**state, "optimizer": optimizer_state}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Json) -> None:
        """Put back what ``capture`` took; generators last, as loading may draw from them.

        Raises:
            CheckpointMismatchError: the tensors belong to another model.
        """
        assert isinstance(state, dict)
        parts: Any = {
            name: decode(value, tensors["state"])
            for name, value in state.items()
            if name != "optimizer"
        }
        load_model(self.model, {**tensors["model"], **parts["model"]})
        optimizer_tensors = tensors.get("optimizer", {})
        restore_optimizer(self.optimizer, self.model, optimizer_tensors, state["optimizer"])
        self.schedule.load_state_dict(parts["scheduler"])
        self.gradient_scaler.load_state_dict(parts["gradient_scaler"])
        self.early_stopping = EarlyStopping(**parts["early_stopping"])
        self.counters = Counters(**parts["counters"])
        self.history = [EpochRecord(**record) for record in parts["history"]]
        self.loss_sum.copy_(parts["loss_sum"])
        self.averages.restore(tensors.get("ema", {}), parts["ema"])
        if isinstance(self.experiment, Stateful):
            self.experiment.load_state_dict(parts["experiment"])
        restore_generators(tensors["state"])

    def _experiment_state(self) -> Mapping[str, Any]:
        return self.experiment.state_dict() if isinstance(self.experiment, Stateful) else {}


def load_model(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a model's state dict. Raises CheckpointMismatchError where names or shapes differ."""
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        found = list(_differences(weights, model.state_dict()))
        shown = found[:MAX_DIFFERENCES_SHOWN] or [" ".join(str(error).split())]
        if len(found) > MAX_DIFFERENCES_SHOWN:
            shown.append(f"and {len(found) - MAX_DIFFERENCES_SHOWN} more")
        raise CheckpointMismatchError(
            f"these weights are not of a {type(model).__name__} as it is configured: "
            f"{'; '.join(shown)}: use the settings and the code that made them, or another run id"
        ) from error


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Each name whose shapes differ, in words."""
    for name in dict.fromkeys([*here, *there]):
        shapes = [
            str(list(entry.shape)) if isinstance(entry := part.get(name), Tensor) else "absent"
            for part in (there, here)
        ]
        if shapes[0] != shapes[1]:
            yield f"{name} is {shapes[0]} there, {shapes[1]} here"


def _split_tensors(state: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Tensors of a module's state dict, and what else it holds (``get_extra_state``)."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return tensors, extra
