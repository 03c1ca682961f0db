"""TrainState: all that a resume needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.averages.ema import MovingAverages
from holdfast.training.checkpointing.json_state import Tensors, decode, encode
from holdfast.training.checkpointing.model_weights import (
    Strides,
    all_laid_out,
    lay_out_model,
    load_model,
    split_state,
    strides_of,
    unusual_strides,
)
from holdfast.training.configuration.schema import Json
from holdfast.training.exactness.seeding import capture_generators, restore_generators
from holdfast.training.loop.early_stopping import EarlyStopping
from holdfast.training.loop.experiment_state import Stateful
from holdfast.training.optimizers.building import CONFIGURED
from holdfast.training.optimizers.optimizer_state import (
    CapturedOptimizer,
    capture_optimizers,
    restore_optimizers,
)
from holdfast.training.optimizers.schedule import Schedule
from holdfast.training.runs.directory import Lineage
from holdfast.training.spikes.rollbacks import LeftOut
from holdfast.training.spikes.watch import SpikeWatch
from holdfast.training.weights.frozen import FrozenParameters, digest_in

OWN_STATE = ("experiment", "model", "stream")
"""What somebody else's ``state_dict`` or ``get_extra_state`` gave."""

if TYPE_CHECKING:  # it takes a moment to import, and few need it
    from holdfast.training.distributed.spreading import Spread


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

    def after_step(self) -> Counters:
        """Where training stands after one more step of the epoch."""
        return Counters(self.step + 1, self.epoch, self.step_in_epoch + 1)


@dataclass
class TrainState:
    """Everything that changes while training, in one place.

    ``loss_sum`` is the sum of the losses of this epoch's steps, fp64 on the training device.
    ``frozen`` are the parameters that checkpoints leave out, where any are; ``stream_state`` is
    that of the training data after the last step, where they are a stream. ``watch`` is there
    where spikes are watched; ``left_out`` are the steps that do nothing because of one. ``spread``
    is there where weights lie in slices on several ranks; each captures and restores its own.
    """

    model: nn.Module
    optimizers: Mapping[str, Optimizer]
    schedule: Schedule
    averages: MovingAverages
    gradient_scaler: torch.amp.GradScaler
    loss_sum: Tensor
    experiment: object = None
    frozen: FrozenParameters | None = None
    watch: SpikeWatch | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    counters: Counters = field(default_factory=Counters)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    history: list[EpochRecord] = field(default_factory=list)
    stream_state: Any = None
    spread: Spread | None = None

    def __post_init__(self) -> None:
        self._first_strides: dict[str, Strides] = {
            name: strides_of(tensor)
            for name, tensor in self.model.state_dict().items()
            if isinstance(tensor, Tensor)
        }
        self._first_flags = _gradient_flags(self.model)

    def capture(self) -> tuple[dict[str, Tensors], Json]:
        """Tensors by file stem, and the JSON of ``state.json``. The tensors are live, not copies.

        Raises:
            UnsupportedStateError: a component's state is neither tensors nor JSON.
            ExperimentError: a frozen parameter that is left out was changed.
        """
        state_tensors: Tensors = dict(capture_generators())
        model_tensors, model_extra = split_state(self.model.state_dict())
        if self.frozen is not None:
            model_tensors = self._without_frozen(model_tensors, self.frozen)
        optimizer = capture_optimizers(self.optimizers, self.model)
        components = {
            "scheduler": self.schedule.state_dict(),
            "gradient_scaler": self.gradient_scaler.state_dict(),
            "early_stopping": asdict(self.early_stopping),
            "counters": asdict(self.counters),
            "history": [asdict(record) for record in self.history],
            "loss_sum": self.loss_sum,
            "ema": self.averages.state(),
            "experiment": self._experiment_state(),
            "model": dict(sorted(model_extra.items())),
        }
        if self.stream_state is not None:
            components["stream"] = self.stream_state
        state = {
            name: encode(value, name, state_tensors, keeps_order=name in OWN_STATE)
            for name, value in components.items()
        }
        tensors = {
            "model": model_tensors,
            "optimizer": optimizer.tensors,
            "ema": self.averages.tensors(),
            "state": state_tensors,
        }
        usual = {"model": self._first_strides, "optimizer": optimizer.usual_strides, "state": {}}
        seldom: dict[str, Any] = {
            "layouts": {
                stem: found
                for stem, strides in usual.items()
                if (found := unusual_strides(tensors[stem], strides))
            },
            "requires_grad": {
                name: flag
                for name, flag in _gradient_flags(self.model).items()
                if flag != self._first_flags.get(name)
            },
            "frozen": None if self.frozen is None else self.frozen.as_json(),
            "spikes": None if self.watch is None else encode(self._spikes(), "spikes", {}),
        }
        named = {name: value for name, value in seldom.items() if value}
        return tensors, {**state, **named, "optimizer": optimizer.values}

    def must_be_finite(
        self, tensors: Mapping[str, Mapping[str, Tensor]], *, with_weights: bool = False
    ) -> dict[str, list[str]]:
        """Names, by file stem, of what must be finite, of what ``capture`` gave.

        The optimizer's state and averages; weights where nobody has looked at them: asked for, or
        where they lie in slices, of which each process has looked at its own.
        """
        found = {"optimizer": list(tensors["optimizer"]), "ema": [*self.averages.averaged()]}
        if not with_weights and self.spread is None:
            return found
        return {**found, "model": sorted(name for name, _ in self.model.named_parameters())}

    def finite_as(self) -> dict[str, str]:
        """By name of an average, the buffer that it follows, which may hold infinities."""
        parameters = {name for name, _ in self.model.named_parameters()}
        sources = {name: name.partition("/")[2] for name in self.averages.averaged()}
        return {name: source for name, source in sources.items() if source not in parameters}

    def changed_by_updates(
        self, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, set[str]]:
        """Names, by file stem, of what an update changes and nothing of ours before it does.

        Weights, averages, and the optimizers' state but for their options: schedules move these.
        """
        weights = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {
            "model": weights & tensors["model"].keys(),
            "ema": {*tensors["ema"]},
            "optimizer": {name for name in tensors["optimizer"] if "group-" not in name},
        }

    def restore(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Json,
        lineage: Lineage | None = None,
    ) -> None:
        """Put back what ``capture`` took; generators last, as loading may draw from them.

        With ``lineage`` it is what a fork begins with: arguments of the optimizer that it changed
        are those of the configuration, and with new rates the schedule begins anew.

        Raises:
            CheckpointMismatchError: the tensors belong to another model, or were trained on
                other frozen parameters.
        """
        assert isinstance(state, dict)
        if self.frozen is not None:
            self.frozen.require(digest_in(state))
        if self.spread is not None:
            tensors = self.spread.sliced(tensors)
        layouts: Any = state.get("layouts", {})
        state_tensors = all_laid_out(tensors["state"], layouts.get("state", {}))
        parts: Any = {
            name: decode(value, state_tensors)
            for name, value in state.items()
            if name not in ("optimizer", "layouts")
        }
        absent = () if self.frozen is None else self.frozen.names
        load_model(self.model, {**tensors["model"], **parts["model"]}, absent)
        lay_out_model(self.model, layouts.get("model", {}))
        _set_gradient_flags(self.model, {**self._first_flags, **parts.get("requires_grad", {})})
        captured = CapturedOptimizer(dict(tensors.get("optimizer", {})), state["optimizer"])
        if lineage is not None:
            captured = _with_changed_options(captured, self.optimizers, lineage)
        restore_optimizers(self.optimizers, self.model, captured, layouts.get("optimizer", {}))
        if lineage is None or not lineage.has_new_rates:
            self.schedule.load_state_dict(parts["scheduler"])
        self.gradient_scaler.load_state_dict(parts["gradient_scaler"])
        self.early_stopping = EarlyStopping(**parts["early_stopping"])
        self.counters = Counters(**parts["counters"])
        self.history = [EpochRecord(**record) for record in parts["history"]]
        self.loss_sum.copy_(parts["loss_sum"])
        self.stream_state = parts.get("stream")
        self.averages.restore(tensors.get("ema", {}), parts["ema"])
        if isinstance(self.experiment, Stateful):
            self.experiment.load_state_dict(parts["experiment"])
        self._restore_spikes(parts.get("spikes"))
        if self.frozen is not None and not self.frozen.names.isdisjoint(tensors["model"]):
            self.frozen.begin()  # the checkpoint is of a run that kept them
        restore_generators(tensors["state"])

    def _without_frozen(self, tensors: Tensors, frozen: FrozenParameters) -> Tensors:
        """The model's tensors that are saved; of the others it is made sure that none changed."""
        if self.counters.step_in_epoch == 0 and self.counters.step > 0:
            frozen.require_same_bits(self.counters.step)
        return frozen.others(tensors)

    @property
    def num_done_in_epoch(self) -> int:
        """Steps of this epoch so far that were not left out."""
        last, num_steps = self.counters.step, self.counters.step_in_epoch
        return num_steps - self.left_out.num_within(last - num_steps + 1, last)

    def _spikes(self) -> dict[str, Any]:
        assert self.watch is not None
        return {**self.watch.state(), "rollbacks": self.left_out.as_state(self.counters.step)}

    def _restore_spikes(self, saved: Any) -> None:
        if saved is not None and self.watch is not None:
            self.watch.restore(saved)
            self.left_out = self.left_out.joined(saved["rollbacks"])

    def _experiment_state(self) -> Mapping[str, Any]:
        return self.experiment.state_dict() if isinstance(self.experiment, Stateful) else {}


def _with_changed_options(
    captured: CapturedOptimizer, optimizers: Mapping[str, Optimizer], lineage: Lineage
) -> CapturedOptimizer:
    """Optimizers' state, in which options that a fork has otherwise are those of ``optimizers``.

    With new rates these are all of them, as schedulers move more than the rate.
    """
    saved: Any = captured.values
    if "optimizers" not in saved:
        own = optimizers.get(CONFIGURED)
        values = _with_options(saved, own, captured.tensors, lineage)
        return replace(captured, values=values)
    parts: dict[str, Json] = {
        name: _with_options(part, optimizers.get(name), captured.tensors, lineage)
        for name, part in saved["optimizers"].items()
    }
    return replace(captured, values={**saved, "optimizers": parts})


def _with_options(
    saved: Any, optimizer: Optimizer | None, tensors: Tensors, lineage: Lineage
) -> Any:
    if optimizer is None or len(saved["groups"]) != len(optimizer.param_groups):
        return saved  # of another optimizer, which is told where it is restored
    groups: list[Json] = []
    for group, own in zip(saved["groups"], optimizer.param_groups, strict=True):
        options = {} if lineage.has_new_rates else group["options"]
        kept = {name: v for name, v in options.items() if name not in lineage.changed_options}
        mine = {name: own[name] for name in own if name not in kept and name != "params"}
        encoded: Any = encode(mine, "of the fork", tensors)
        groups.append({**group, "options": {**encoded, **kept}})
    return {**saved, "groups": groups}


def _gradient_flags(model: nn.Module) -> dict[str, bool]:
    """Which parameters are trained; an experiment may freeze and unfreeze layers on the way."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _set_gradient_flags(model: nn.Module, flags: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        if name in flags and parameter.requires_grad != flags[name]:
            parameter.requires_grad_(flags[name])
