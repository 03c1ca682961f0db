"""The optimizers of a run: one by name, over named groups or not, or several of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.configuration.constructor_arguments import check_arguments
from holdfast.training.configuration.loading import nearest
from holdfast.training.configuration.schema import OptimizerConfig
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.experiment.loading import load_class
from holdfast.training.experiment.protocol import hook

CONFIGURED = ""
"""The name of the optimizer that the configuration makes; those of one's own have others."""
OWN_STEP = "write optimizers(model) and training_step(model, step)"
MAX_SHOWN = 4


def build_optimizers(
    experiment: object, config: OptimizerConfig, model: nn.Module
) -> dict[str, Optimizer]:
    """The optimizers of a run by name; the configured one is alone, and called CONFIGURED.

    Raises:
        ConfigError: what is configured has no effect, or does not fit.
        ExperimentError: a trainable parameter is in no optimizer or group, or in more than one.
    """
    kind = type(experiment).__name__
    if (build := hook(experiment, "optimizers")) is None:
        return {CONFIGURED: build_optimizer(config, model, experiment)}
    if not hook(experiment, "training_step") or hook(experiment, "parameter_groups"):
        raise ExperimentError(
            f"{kind} has optimizers(model): it needs training_step(model, step), which says when "
            f"each of them moves, and no parameter_groups(model), which the configured one has"
        )
    if config != OptimizerConfig():
        raise ConfigError(
            f"optimizer.name = {config.name!r} with {config.args} has no effect: "
            f"{kind}.optimizers makes them; leave it out, and take rates from [experiment]"
        )
    optimizers: Any = build(model)
    are_named = isinstance(optimizers, Mapping) and all(map(_is_named, optimizers.items()))
    if not are_named or not optimizers:
        raise ExperimentError(
            f"{kind}.optimizers must return torch optimizers by names that are identifiers, such "
            f"as {{'critic': torch.optim.Adam(...)}}; found {_in_one_line(optimizers)}"
        )
    parameters = {name: parameters_of(optimizer) for name, optimizer in optimizers.items()}
    sharing = getattr(experiment, "sharing_optimizers", ())
    _require_each_once(model, parameters, f"{kind}.optimizers", sharing)
    return dict(optimizers)


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, experiment: object = None
) -> Optimizer:
    """The configured optimizer over all trainable parameters, in the experiment's groups.

    Raises:
        ConfigError: there is no such optimizer, or it does not take these arguments.
        ExperimentError: the model has nothing to train, or the groups don't cover it.
    """
    own = subclasses_in(torch.optim, Optimizer)
    unsupported = {name: why for name, kind in own.items() if (why := _lacking(kind))}
    found = class_of("optimizer", config.name, own, unsupported, Optimizer)
    if why := _lacking(found):
        raise ConfigError(f"optimizer.name = {config.name!r} is not supported: {why}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ExperimentError(
            f"the model {type(model).__name__} has no parameters that require gradients: there is "
            "nothing to train; check what the experiment's model() returns"
        )
    if (list_groups := hook(experiment, "parameter_groups")) is None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer: Optimizer = construct("optimizer", found, parameters, config.args)
        return optimizer
    method = f"{type(experiment).__name__}.parameter_groups"
    groups = _groups(list_groups(model), model, method)
    optimizer = construct("optimizer", found, groups, config.args)
    known = {"params", "name", *optimizer.defaults}
    unknown = [key for group in groups for key in group if key not in known]
    if unknown and found in own.values():
        raise ExperimentError(
            f"{method}: {config.name} has no option {unknown[0]!r}; "
            f"{nearest(unknown[0], optimizer.defaults)}"
        )
    return optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All that an optimizer trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def class_of(
    section: str,
    name: str,
    own: Mapping[str, type],
    unsupported: Mapping[str, str],
    base: type,
) -> Any:
    """The class that ``<section>.name`` names: of torch and ours, or ``package.module:Class``.

    Raises ConfigError, which says why ``unsupported`` ones are not.
    """
    told = f"{section}.name = {name!r}"
    if ":" not in name:
        offered = {key: kind for key, kind in own.items() if key not in unsupported}
        if name in offered:
            return offered[name]
        why = f": {unsupported[name]}" if name in unsupported else ""
        raise ConfigError(f"{told} is not supported{why}; {nearest(name, offered)}")
    try:
        found = load_class(name)
    except ExperimentError as error:
        raise ConfigError(f"{told}: {error}") from error
    if not issubclass(found, base):
        raise ConfigError(f"{told} is no {base.__module__}.{base.__name__}")
    return found


def construct(section: str, factory: Any, subject: Any, args: Mapping[str, Any]) -> Any:
    """An object of a class, with the arguments of its table. Raises ConfigError."""
    check_arguments(f"{section}.args", factory, args)
    try:
        return factory(subject, **args)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ConfigError(f"{section}.args = {dict(args)} do not fit: {error}") from error


def subclasses_in(module: Any, base: type) -> dict[str, type]:
    """Classes of a module by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base)
    }


def _lacking(kind: type[Optimizer]) -> str:
    """What an optimizer needs that the configured loop does not give, and the way out."""
    if kind is Optimizer:
        return "other optimizers derive from it"
    if issubclass(kind, torch.optim.SparseAdam):
        return f"it takes sparse gradients alone, and other layers have dense ones: {OWN_STEP}"
    _, *others = inspect.signature(kind.step).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in others:
        if parameter.default is parameter.empty and parameter.kind not in variadic:
            return f"its step() needs a {parameter.name}: {OWN_STEP}, which may give one"
    return ""


def _is_named(entry: tuple[object, object]) -> bool:
    name, optimizer = entry
    return isinstance(name, str) and name.isidentifier() and isinstance(optimizer, Optimizer)


def _groups(found: Any, model: nn.Module, method: str) -> list[dict[str, Any]]:
    """The groups that an experiment returned, with lists of parameters."""
    if not isinstance(found, Iterable) or not all(_is_group(group) for group in found):
        raise ExperimentError(
            f"{method} must return a list of dicts with a text 'name' and an iterable of "
            f"parameters 'params'; found {_in_one_line(found)}"
        )
    groups = [{**group, "params": list(group["params"])} for group in found]
    names = [group["name"] for group in groups]
    if len(set(names)) < len(names):
        raise ExperimentError(f"{method}: the names must differ from each other; found {names}")
    _require_each_once(model, {group["name"]: group["params"] for group in groups}, method)
    return groups


def _is_group(group: object) -> bool:
    return (
        isinstance(group, Mapping)
        and isinstance(group.get("name"), str)
        and isinstance(group.get("params"), Iterable)
    )


def _require_each_once(
    model: nn.Module,
    parameters: Mapping[str, list[Any]],
    method: str,
    sharing: Collection[str] = (),
) -> None:
    """Make sure that what is listed by name holds each trainable parameter once.

    ``sharing`` are the names that may have parameters in common. Raises ExperimentError.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[str, list[str]] = {}
    for owner, listed in parameters.items():
        for parameter in listed:
            if id(parameter) not in names:
                found = getattr(parameter, "shape", type(parameter).__name__)
                raise ExperimentError(
                    f"{method}: {owner} holds what is no parameter of the model, a "
                    f"{type(parameter).__name__} of shape {list(found)}: give parameters "
                    f"themselves, of layers that model() built"
                )
            owners.setdefault(names[id(parameter)], []).append(owner)
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if missing := [name for name in trained if name not in owners]:
        raise ExperimentError(
            f"{method} leaves out {_shown(missing)}: each trainable parameter belongs to one of "
            f"{', '.join(parameters)}; freeze with requires_grad_(False) what is not to be trained"
        )
    twice = [
        f"{name} in {' and '.join(found)}"
        for name, found in owners.items()
        if len(set(found)) < len(found) or (len(found) > 1 and not {*found} <= {*sharing})
    ]
    if twice:
        way_out = ", or name optimizers that may share in sharing_optimizers"
        raise ExperimentError(
            f"{method} names a parameter more than once: {_shown(twice)}; leave one out{way_out}"
        )


def _in_one_line(value: object) -> str:
    return " ".join(repr(value).split())[:200]


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return f"{', '.join(names[:MAX_SHOWN])}{more}"
