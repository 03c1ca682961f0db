"""Is what a checkpoint holds a state that can be put back? Asked before anything is put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.training.checkpointing.json_state import decode
from holdfast.training.checkpointing.loading import RestoredCheckpoint
from holdfast.training.errors import CheckpointCorruptError, DataFormatError
from holdfast.training.exactness.seeding import generator_problem
from holdfast.training.loop.early_stopping import EarlyStopping
from holdfast.training.loop.state import Counters, EpochRecord
from holdfast.training.optimizers.rate_trace import RateTrace
from holdfast.training.runs.stored_json import Kinds, required_fields, shape_expected

PARTS: Kinds = {
    "scheduler": (dict,),
    "gradient_scaler": (dict,),
    "early_stopping": (dict,),
    "counters": (dict,),
    "history": (list,),
    "ema": (dict,),
    "model": (dict,),
    "optimizer": (dict,),
}
COUNTERS: Kinds = {"step": (int,), "epoch": (int,), "step_in_epoch": (int,)}
EARLY_STOPPING: Kinds = {"best": (float, type(None)), "num_epochs_since_best": (int,)}
EPOCH: Kinds = {"epoch": (int,), "step": (int,), "metrics": (dict,)}
OPTIMIZER: Kinds = {"groups": (list,), "parameters": (dict,)}
GROUP: Kinds = {"params": (list,), "options": (dict,)}


def validate_state(restored: RestoredCheckpoint) -> None:
    """Raise CheckpointCorruptError for a checkpoint that no training has saved.

    Its bytes are what its manifest says; this asks whether they mean something. Whether the state
    fits this model and this configuration is asked elsewhere: then the checkpoint is not at fault.
    """
    place = restored.path / "state.json"
    try:
        with shape_expected(place):
            _validate(restored, str(place))
    except (DataFormatError, CheckpointCorruptError, RecursionError) as error:
        raise CheckpointCorruptError(f"{place} cannot be put back: {error}") from error


def _validate(restored: RestoredCheckpoint, place: str) -> None:
    state = required_fields(restored.state, place, PARTS)
    tensors = restored.tensors["state"]
    restored.tensors["model"]
    _validate_optimizer(state["optimizer"], restored.tensors.get("optimizer", {}), place)
    # No copies: only whether every reference leads somewhere is of interest.
    parts = {
        name: decode(value, _placeholders(tensors))
        for name, value in state.items()
        if name != "optimizer"
    }
    counters = required_fields(parts["counters"], f"{place}: counters", COUNTERS)
    _require(min(counters.values()) >= 0, f"its counters are {counters}")
    at = Counters(**counters)
    manifest = restored.manifest
    _require((at.step, at.epoch) == (manifest.step, manifest.epoch), f"its counters are {counters}")
    EarlyStopping(**required_fields(parts["early_stopping"], place, EARLY_STOPPING))
    for entry in parts["history"]:
        EpochRecord(**required_fields(entry, f"{place}: history", EPOCH))
    scheduler = required_fields(parts["scheduler"], f"{place}: scheduler", {"num_steps": (int,)})
    _require(RateTrace.restored(scheduler.get("trace")).every >= 1, "its trace is none")
    loss_sum = tensors[state["loss_sum"]["$tensor"]]
    _require(loss_sum.numel() == 1, "its sum of losses is no number")
    problem = generator_problem(tensors)
    _require(problem is None, str(problem))


def _validate_optimizer(state: Any, tensors: Mapping[str, Tensor], place: str) -> None:
    place = f"{place}: optimizer"
    if isinstance(several := state.get("optimizers"), dict):
        for name, one in several.items():
            _validate_optimizer(required_fields(one, place, {}), tensors, f"{place} {name}")
        return
    held = required_fields(state, place, OPTIMIZER)
    decode(held["parameters"], _placeholders(tensors))
    for group in held["groups"]:
        found = required_fields(group, place, GROUP)
        _require(all(isinstance(name, str) for name in found["params"]), "its groups are none")
        decode(found["options"], _placeholders(tensors))


class _Placeholders(Mapping[str, Tensor]):
    """Tensors of no size under the names of others."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        self._tensors[name]
        return torch.empty(0, dtype=torch.uint8)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _placeholders(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return _Placeholders(tensors)


def _require(is_good: bool, problem: str) -> None:
    if not is_good:
        raise ValueError(problem)
