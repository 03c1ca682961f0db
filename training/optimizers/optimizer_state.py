"""An optimizer's state, keyed by parameter name, taken and put back as it was.

torch's own loader casts state to the type of its parameter and lays it out anew: NAdam's product of
momenta, kept in fp32 beside fp64 weights, would round differently after a resume. So the state is
put back here, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.checkpointing.json_state import Tensors, decode, encode
from holdfast.training.checkpointing.model_weights import Strides, laid_out, strides_of
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import CheckpointMismatchError, UnsupportedStateError
from holdfast.training.optimizers.building import CONFIGURED


@dataclass(frozen=True)
class CapturedOptimizer:
    """What a checkpoint holds of an optimizer.

    Attributes:
        tensors: as ``<parameter>/<entry>``, after ``<optimizer>/`` where there are several.
        values: the rest, as JSON.
        usual_strides: how the tensors usually lie: as their parameters do.
    """

    tensors: Tensors
    values: Json
    usual_strides: Mapping[str, Strides] = field(default_factory=dict)


def capture_optimizers(optimizers: Mapping[str, Optimizer], model: nn.Module) -> CapturedOptimizer:
    """The live state of a run's optimizers; of one that is configured, as it is alone."""
    if CONFIGURED in optimizers:
        return capture_optimizer(optimizers[CONFIGURED], model)
    captured = {
        name: capture_optimizer(optimizer, model, f"{name}/")
        for name, optimizer in optimizers.items()
    }
    tensors: Tensors = {}
    usual: dict[str, Strides] = {}
    for part in captured.values():
        tensors |= part.tensors
        usual |= part.usual_strides
    values: Json = {"optimizers": {name: part.values for name, part in captured.items()}}
    return CapturedOptimizer(tensors, values, usual)


def restore_optimizers(
    optimizers: Mapping[str, Optimizer],
    model: nn.Module,
    captured: CapturedOptimizer,
    strides: Mapping[str, Strides] = MappingProxyType({}),
) -> None:
    """Put back what ``capture_optimizers`` took; ``strides`` are the unusual ones.

    Raises:
        CheckpointMismatchError: the state belongs to other optimizers or other parameters.
    """
    state: Any = captured.values
    parts: dict[str, Json] = state.get("optimizers", {CONFIGURED: state})
    if parts.keys() != optimizers.keys():
        there, here = (
            ", ".join(names) or "the configured one" for names in (map(str, parts), optimizers)
        )
        raise CheckpointMismatchError(
            f"the checkpoint has the optimizers {there}, this experiment {here}: use the code that "
            f"made it, or another run id"
        )
    for name, optimizer in optimizers.items():
        part = replace(captured, values=parts[name])
        restore_optimizer(optimizer, model, part, strides, f"{name}/" if name else "")


def capture_optimizer(
    optimizer: Optimizer, model: nn.Module, prefix: str = ""
) -> CapturedOptimizer:
    """The optimizer's live state. ``prefix`` comes before the names of its tensors.

    Keyed by name rather than by index, so that the state can be moved to another layout.

    Raises UnsupportedStateError where the optimizer trains what the model no longer has, or keeps
    state of no parameter.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if any(id(p) not in names for group in optimizer.param_groups for p in group["params"]):
        raise UnsupportedStateError(
            f"the optimizer trains a parameter that {type(model).__name__} no longer has: change "
            "parameters in place, and build all layers in model()"
        )
    _require_only_parameters(optimizer)
    tensors: Tensors = {}
    values: dict[str, Json] = {}
    usual: dict[str, Strides] = {}
    odd_places: list[Json] = []
    for parameter, group in _with_groups(optimizer):
        if parameter not in optimizer.state:
            continue
        name, entries = names[id(parameter)], dict(optimizer.state[parameter])
        values[name] = encode(entries, f"{prefix}{name}", tensors)
        for key, tensor in _tensors_of(entries):
            path = f"{prefix}{name}/{key}"
            if tensor.shape == parameter.shape:
                usual[path] = strides_of(parameter)
            if tensor.device != _usual_device(key, parameter, group):
                odd_places.append(path)
    groups: list[Json] = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        encoded = encode(options, f"{prefix}group-{len(groups)}", tensors)
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
    prefix: str = "",
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
    tensors = {n: t.cpu() if "group-" in n else t for n, t in captured.tensors.items()}
    packed, start = [], 0
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        end = start + len(group["params"])
        options = _options(own, decode(group["options"], tensors))
        packed.append({**options, "params": [*range(start, end)]})
        start = end
    # Past a class's own loader, which may expect what its own state_dict() gave.
    Optimizer.load_state_dict(optimizer, {"state": {}, "param_groups": packed})
    odd_places: Any = state.get("odd_places", [])
    entries: Any = decode(state["parameters"], tensors)
    names = {parameter: name for name, parameter in parameters.items()}
    for parameter, group in _with_groups(optimizer):
        name = names[parameter]
        if name in entries:
            optimizer.state[parameter] = _placed(
                entries[name], f"{prefix}{name}", parameter, group, strides, odd_places
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
    placed = {
        key: entry
        if isinstance(entry, Tensor)
        else _nest_placed(entry, f"{name}/{key}", parameter.device, strides)
        for key, entry in entries.items()
    }
    for key, tensor in _tensors_of(entries):
        path = f"{name}/{key}"
        usual = strides_of(parameter) if tensor.shape == parameter.shape else None
        device = _usual_device(key, parameter, group)
        if path in odd_places:
            device = torch.device("cpu") if device.type != "cpu" else parameter.device
        placed[key] = laid_out(tensor.to(device), strides.get(path, usual))
    return placed


def _nest_placed(nest: Any, path: str, device: torch.device, strides: Mapping[str, Strides]) -> Any:
    """Tensors in lists and dicts, as the history of LBFGS, lie beside their parameter."""
    if isinstance(nest, Tensor):
        return laid_out(nest.to(device), strides.get(path))
    if isinstance(nest, (list, tuple)):
        placed = [_nest_placed(x, f"{path}/{i}", device, strides) for i, x in enumerate(nest)]
        return type(nest)(placed)
    if isinstance(nest, dict):
        return {key: _nest_placed(x, f"{path}/{key}", device, strides) for key, x in nest.items()}
    return nest


def _require_only_parameters(optimizer: Optimizer) -> None:
    """Make sure that nothing is kept where no checkpoint looks. Raises UnsupportedStateError."""
    kind = type(optimizer)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    others = [str(key) for key in optimizer.state if id(key) not in trained]
    if kind.state_dict is not Optimizer.state_dict:
        others += optimizer.state_dict().keys() - {"state", "param_groups"}
    if others:
        raise UnsupportedStateError(
            f"{kind.__name__} keeps {others[0][:80]!r}, which belongs to none of its parameters "
            f"and would be lost: keep it in state[parameter] or in the parameter groups"
        )


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
