"""An optimizer's state, keyed by parameter name, taken and put back as it was.

torch's own loader casts state to the type of its parameter and lays it out anew: NAdam's product of
momenta, kept in fp32 beside fp64 weights, would round differently after a resume. So the state is
put back here, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.checkpointing.json_state import Tensors, decode, encode
from holdfast.training.checkpointing.layouts import Strides, laid_out, strides_of
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import CheckpointMismatchError, UnsupportedStateError


@dataclass(frozen=True)
class CapturedOptimizer:
    """What a checkpoint holds of an optimizer.

    Attributes:
        tensors: as ``<parameter>/<entry>``.
        values: the rest, as JSON.
        usual_strides: how the tensors usually lie: as their parameters do.
    """

    tensors: Tensors
    values: Json
    usual_strides: Mapping[str, Strides] = field(default_factory=dict)


def capture_optimizer(optimizer: Optimizer, model: nn.Module) -> CapturedOptimizer:
    """The optimizer's live state.

    Keyed by name rather than by index, so that the state can be moved to another layout.

    Raises UnsupportedStateError where the optimizer trains what the model no longer has.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if any(id(p) not in names for group in optimizer.param_groups for p in group["params"]):
        raise UnsupportedStateError(
            f"the optimizer trains a parameter that {type(model).__name__} no longer has: change "
            "parameters in place, and build all layers in model()"
        )
    tensors: Tensors = {}
    values: dict[str, Json] = {}
    usual: dict[str, Strides] = {}
    odd_places: list[Json] = []
    for parameter, group in _with_groups(optimizer):
        if parameter not in optimizer.state:
            continue
        name, entries = names[id(parameter)], dict(optimizer.state[parameter])
        values[name] = encode(entries, name, tensors)
        for key, tensor in _tensors_of(entries):
            if tensor.shape == parameter.shape:
                usual[f"{name}/{key}"] = strides_of(parameter)
            if tensor.device != _usual_device(key, parameter, group):
                odd_places.append(f"{name}/{key}")
    groups: list[Json] = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        encoded = encode(options, f"group-{len(groups)}", tensors)
        groups.append({"params": [names[id(p)] for p in group["params"]], "options": encoded})
    captured: dict[str, Json] = {"parameters": values, "groups": groups}
    return CapturedOptimizer(
        tensors, {**captured, "odd_places": odd_places} if odd_places else captured, usual
    )


def restore_optimizer(
    optimizer: Optimizer,
    model: nn.Module,
    captured: CapturedOptimizer,
    strides: Mapping[str, Strides] = MappingProxyType({}),
) -> None:
    """Put back what ``capture_optimizer`` took; ``strides`` are the unusual ones.

    Layers that were unfrozen on the way join the optimizer again.

    Raises:
        CheckpointMismatchError: the state belongs to other parameters than the model has.
    """
    state = captured.values
    assert isinstance(state, dict)
    groups: Any = state["groups"]
    parameters = dict(model.named_parameters())
    _rejoin(optimizer, parameters, [group["params"] for group in groups])
    _require_options(optimizer, groups)
    packed, start = [], 0
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        end = start + len(group["params"])
        options = _options(own, decode(group["options"], captured.tensors))
        packed.append({**options, "params": [*range(start, end)]})
        start = end
    optimizer.load_state_dict({"state": {}, "param_groups": packed})
    odd_places: Any = state.get("odd_places", [])
    entries: Any = decode(state["parameters"], captured.tensors)
    names = {parameter: name for name, parameter in parameters.items()}
    for parameter, group in _with_groups(optimizer):
        name = names[parameter]
        if name in entries:
            optimizer.state[parameter] = _placed(
                entries[name], name, parameter, group, strides, odd_places
            )


def join_optimizer(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Train a parameter from now on that was frozen when the optimizer was built."""
    optimizer.param_groups[0]["params"].append(parameter)
    if isinstance(optimizer, torch.optim.Adagrad):  # the one that makes its state beforehand
        alone = torch.optim.Adagrad(
            [parameter], initial_accumulator_value=optimizer.defaults["initial_accumulator_value"]
        )
        optimizer.state[parameter] = alone.state[parameter]


def _placed(
    entries: Mapping[str, Any],
    name: str,
    parameter: Tensor,
    group: Mapping[str, Any],
    strides: Mapping[str, Strides],
    odd_places: list[str],
) -> dict[str, Any]:
    placed = dict(entries)
    for key, tensor in _tensors_of(entries):
        path = f"{name}/{key}"
        usual = strides_of(parameter) if tensor.shape == parameter.shape else None
        device = _usual_device(key, parameter, group)
        if path in odd_places:
            device = torch.device("cpu") if device.type != "cpu" else parameter.device
        placed[key] = laid_out(tensor.to(device), strides.get(path, usual))
    return placed


def _usual_device(key: str, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where torch's optimizers keep an entry: counts of steps in memory, unless asked otherwise."""
    is_on_device = group.get("capturable") or group.get("fused")
    return torch.device("cpu") if key == "step" and not is_on_device else parameter.device


def _with_groups(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, group


def _tensors_of(entries: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in entries.items():
        if isinstance(value, Tensor):
            yield key, value


def _options(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options; those that are tensors lie where they lay."""
    return {
        key: value.to(own[key].device)
        if isinstance(value, Tensor) and isinstance(own.get(key), Tensor)
        else value
        for key, value in saved.items()
    }


def _rejoin(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], saved: list[list[str]]
) -> None:
    names = {id(parameter): name for name, parameter in parameters.items()}
    own = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    num_own = len(own[0])
    joined = saved[0][num_own:] if saved and len(saved) == len(own) else []
    if all(name in parameters for name in joined) and [*own[0], *joined] == saved[0]:
        for name in joined:
            join_optimizer(optimizer, parameters[name])
        own[0] += joined
    if own != saved:
        raise CheckpointMismatchError(
            f"the optimizer of the checkpoint has parameters {saved}, this one {own}"
        )


def _require_options(optimizer: Optimizer, groups: Any) -> None:
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        differing = sorted((own.keys() - {"params"}) ^ group["options"].keys())
        if differing:
            raise CheckpointMismatchError(
                f"the checkpoint is of another optimizer than {type(optimizer).__name__}: only one "
                f"of them has {', '.join(differing)}; use the optimizer of the checkpoint"
            )
