"""The trackers that there are: the protocol, and the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from holdfast.training.configuration.schema import TrackingConfig
from holdfast.training.errors import ConfigError
from holdfast.training.runs.directory import RunRecord
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.tracking.points import Point


@dataclass(frozen=True)
class Tracked:
    """The run that is told of.

    Attributes:
        identity: tells the run from all others, also after its folder was moved or copied.
        project: what its runs are filed under.
    """

    run: RunDirectory
    record: RunRecord
    identity: str
    project: str


class Tracker(Protocol):
    """One tracker, to which one run is sent by one process at a time."""

    def newest(self) -> Mapping[str, int]:
        """By tag, the newest step that the tracker has of this run already."""
        ...

    def send(self, points: Iterable[Point]) -> None:
        """Send scalars, steps ascending. After return the tracker has them."""
        ...

    def close(self, *, is_completed: bool) -> None:
        """Nothing more comes from this process; the training may go on elsewhere."""
        ...


TRACKERS = {
    "tensorboard": "holdfast.training.tracking.to_tensorboard:TensorBoard",
    "mlflow": "holdfast.training.tracking.to_mlflow:Mlflow",
    "wandb": "holdfast.training.tracking.to_wandb:WandB",
}
"""By the name of its library, which is that of the extra, too."""


def check_trackers(config: TrackingConfig) -> None:
    """Raises ConfigError where a tracker is asked for and its library is missing."""
    for name in config.to:
        if find_spec(name) is None:
            raise ConfigError(
                f'tracking.to = ["{name}"] needs the package {name}, which is not installed: '
                f"pip install 'holdfast[{name}]', or leave it out"
            )


def open_tracker(name: str, tracked: Tracked) -> Tracker:
    """A tracker of the table. Raises what its library raises."""
    module, _, kind = TRACKERS[name].partition(":")
    opened: Tracker = getattr(importlib.import_module(module), kind)(tracked)
    return opened


def plain_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration by dotted keys, without what is not set."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= plain_config(value, f"{prefix}{key}.")
        elif value not in (None, [], ()):
            found[f"{prefix}{key}"] = value
    return found
