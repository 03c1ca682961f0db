"""``train.initial_weights``: what ``model()`` begins with in the place of what it draws.

``InitialWeights`` stands in for the experiment's ``model``, so that a fresh model is the same one
in every segment and in every later stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.weights.reading import MAX_NAMES_SHOWN, read_weights

logger = logging.getLogger(__name__)

WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before names."""
INNER_WRAPPER = "._orig_mod."


class InitialWeights:
    """A method ``model()`` whose model has given weights."""

    def __init__(self, build: Callable[[], nn.Module], config: RunConfig) -> None:
        self._build = build
        self._config = config
        self._is_told = False

    def __call__(self) -> nn.Module:
        """A fresh model with them.

        Raises:
            InputError: there are none, they cannot be read without running code, or don't fit.
            CheckpointCorruptError, StorageError: they cannot be read.
        """
        place = self._config.train.initial_weights
        assert place is not None
        model = self._build()
        left_out = take_weights(model, read_weights(place), self._config, place)
        if left_out and not self._is_told:
            logger.warning("train.initial_weights = %s fits in part: %s", place, left_out)
        self._is_told = True
        return model


def take_weights(
    model: nn.Module, given: Mapping[str, Tensor], config: RunConfig, place: Path
) -> str:
    """Copy weights into a model, cast to its types. Returns what does not fit, in words.

    Names are changed by ``train.initial_weights_names``; then what DataParallel and torch.compile
    put before them is taken away. Frozen parameters that a checkpoint left out stay the model's.

    Raises ConfigError where something does not fit, unless that is allowed, or nothing fits.
    """
    lazy = [name for name, one in [*model.named_parameters(), *model.named_buffers()] if
            is_lazy(one)]  # fmt: skip
    if lazy:
        raise ExperimentError(
            f"{lazy[0]} of the model {type(model).__name__} has no shape yet, so that "
            f"train.initial_weights cannot fill it: give its layer its size"
        )
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    named = renamed(given, own.keys(), config.train.initial_weights_names, place)
    fitting = {name: value for name, value in named.items() if _fits(value, own.get(name))}
    filled = {_place(own[name]) for name in fitting}
    missing = [name for name in own if name not in named and _place(own[name]) not in filled]
    if config.checkpoint.frozen == "left_out":
        missing = _but_all_frozen(model, missing)
    problem = _problem(own, named, missing)
    if problem and (config.train.should_take_all_weights or not fitting):
        raise ConfigError(
            f"train.initial_weights = {str(place)!r} does not fit {type(model).__name__}: "
            f"{problem}: name tensors anew with train.initial_weights_names, or take what fits "
            f"with train.should_take_all_weights=false"
        )
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    return problem


def renamed(
    given: Mapping[str, Tensor], own: Iterable[str], table: Mapping[str, str], place: Path
) -> dict[str, Tensor]:
    """Tensors by the names that the model has for them.

    Raises ConfigError where a beginning of the table begins no name, or two names become one.
    """
    known = set(own)
    idle = [old for old in table if not any(name.startswith(old) for name in given)]
    if idle:
        raise ConfigError(
            f"train.initial_weights_names names {idle[0]!r}, with which no tensor of {place} "
            f"begins; they are {shown(list(given))}"
        )
    found: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, tensor in given.items():
        target = _new_name(name, known, table)
        if target in found:
            raise ConfigError(
                f"{sources[target]} and {name} of {place} both become {target}: change "
                f"train.initial_weights_names"
            )
        found[target], sources[target] = tensor, name
    return found


def shown(names: Sequence[str]) -> str:
    """A few of them, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{', '.join(names[:MAX_NAMES_SHOWN])}{more}"


def without_wrappers(name: str) -> str:
    """A name without what DataParallel and torch.compile put before it, and into it."""
    for wrapper in WRAPPERS:
        if name.startswith(wrapper):
            return without_wrappers(name.removeprefix(wrapper))
    return name.replace(INNER_WRAPPER, ".")


def _new_name(name: str, known: set[str], table: Mapping[str, str]) -> str:
    old = max((old for old in table if name.startswith(old)), key=len, default=None)
    if old is not None:
        name = table[old] + name.removeprefix(old)
    stripped = without_wrappers(name)
    return stripped if name not in known and stripped in known else name


def _fits(given: Tensor, own: Tensor | None) -> bool:
    return (
        own is not None
        and own.shape == given.shape
        and own.is_floating_point() == given.is_floating_point()
        and own.is_complex() == given.is_complex()
    )


def _place(tensor: Tensor) -> object:
    """Equal for two names of one tensor."""
    return (tensor.data_ptr(), tensor.shape) if tensor.numel() else object()


def _but_all_frozen(model: nn.Module, missing: list[str]) -> list[str]:
    """What is missing beside the frozen parameters, where all of these are missing."""
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return [name for name in missing if name not in frozen] if frozen <= {*missing} else missing


def _problem(own: Mapping[str, Tensor], named: Mapping[str, Tensor], missing: Sequence[str]) -> str:
    unexpected = [name for name in named if name not in own]
    other = [
        f"{name} ({_kind(value)} there, {_kind(own[name])} here)"
        for name, value in named.items()
        if name in own and not _fits(value, own[name])
    ]
    parts = [
        f"it lacks {shown(missing)}" if missing else "",
        f"the model has no {shown(unexpected)}" if unexpected else "",
        f"of another shape or kind is {shown(other)}" if other else "",
    ]
    return "; ".join(part for part in parts if part)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
