"""What an experiment's own functions of the step make of its groups' options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from holdfast.training.configuration.loading import nearest
from holdfast.training.errors import ExperimentError
from holdfast.training.experiment.protocol import hook

METHODS = {"rate_factor": "lr", "weight_decay_factor": "weight_decay"}


@dataclass(frozen=True)
class Group:
    """A parameter group, found again in its optimizer whenever that has loaded a state.

    Attributes:
        label: its name; after the name of the optimizer where there are several.
    """

    label: str
    optimizer: Optimizer
    index: int

    @property
    def options(self) -> dict[str, Any]:
        """Its options, live."""
        options: dict[str, Any] = self.optimizer.param_groups[self.index]
        return options

    @property
    def rate(self) -> float:
        """Its learning rate."""
        return float(self.options["lr"])


def labelled_groups(optimizers: Mapping[str, Optimizer]) -> list[Group]:
    """All groups, in order."""
    return [
        Group("/".join(filter(None, (name, own))), optimizer, index)
        for name, optimizer in optimizers.items()
        for index, own in enumerate(_names(optimizer))
    ]


def _names(optimizer: Optimizer) -> list[str]:
    """Of its groups, as they are called or else numbered; of one without a name, none."""
    names = [options.get("name") for options in optimizer.param_groups]
    if len({*names}) == len(names) and all(isinstance(name, str) for name in names):
        return [str(name) for name in names]
    return [""] if len(names) == 1 else [str(index) for index in range(len(names))]


class Factors:
    """Sets options to their first values times what the experiment's methods say.

    ``rate_factor(step)`` and ``weight_decay_factor(step)`` depend on the number of steps that are
    done alone, so nothing of them is in a checkpoint.
    """

    def __init__(self, experiment: object, groups: list[Group]) -> None:
        """Raises ExperimentError where a method has nothing to set."""
        self._methods = []
        for name, option in METHODS.items():
            if (function := hook(experiment, name)) is None:
                continue
            told = f"{type(experiment).__name__}.{name}"
            scaled = [(group, group.options[option]) for group in groups if option in group.options]
            if not scaled:
                raise ExperimentError(f"{told}: no parameter group has a {option}; leave it out")
            self._methods.append(_Method(told, function, option, scaled))

    @property
    def has_rate(self) -> bool:
        """Whether the experiment says the learning rate."""
        return any(method.option == "lr" for method in self._methods)

    def apply(self, num_steps: int) -> None:
        """Set the options for the step after ``num_steps``. Raises ExperimentError."""
        for method in self._methods:
            method.apply(num_steps)


@dataclass(frozen=True)
class _Method:
    told: str
    function: Callable[[int], Any]
    option: str
    scaled: list[tuple[Group, float]]

    def apply(self, num_steps: int) -> None:
        found = self.function(num_steps)
        for group, first in self.scaled:
            group.options[self.option] = first * self._factor(found, group.label, num_steps)

    def _factor(self, found: Any, label: str, num_steps: int) -> float:
        if isinstance(found, Mapping) and label not in found:
            raise ExperimentError(
                f"{self.told}({num_steps}) says nothing of the group {label!r}; "
                f"{nearest(label, map(str, found))}"
            )
        factor = found[label] if isinstance(found, Mapping) else found
        if type(factor) not in (int, float) or not 0 <= factor < math.inf:
            raise ExperimentError(
                f"{self.told}({num_steps}) must be a number from 0 on, or a dict of them by the "
                f"groups' names; found {factor!r}"
            )
        return float(factor)
