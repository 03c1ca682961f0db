"""The champion as it is exported: whole, and merged where the experiment says so.

Where training left frozen parameters out, the champion's file holds what was trained alone. A
bundle holds the whole model, so that nobody needs the base.

An experiment may have one more method, that of ``Merging``: adapters, say, are then folded into the
weights that they adapt, and the exported model costs what the base costs. What is exported is held
to the answers of the model as it was trained, so a merge that changes them is not published.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from holdfast.training.averages.averaging import write_weights
from holdfast.training.checkpointing.json_state import encode
from holdfast.training.checkpointing.model_weights import split_state
from holdfast.training.configuration.schema import CheckpointConfig, Json
from holdfast.training.errors import ExportError, UnsupportedStateError, kind_of
from holdfast.training.experiment.protocol import Experiment
from holdfast.training.export.weights import load_champion
from holdfast.training.weights.frozen import load_saved, recorded_extra_state

APART_NAME = "apart.safetensors"
MERGED_NAME = "merged.safetensors"
APART = "_experiment_that_is_merged"


@runtime_checkable
class Merging(Protocol):
    """What an experiment has whose model is exported otherwise than it is trained."""

    def merged(self, model: nn.Module) -> nn.Module:
        """A model that gives the same answers, to rounding, such as one without adapters.

        Args:
            model: the trained one, which may be changed and returned.
        """
        ...


def merged_experiment(experiment: Experiment) -> Experiment:
    """The experiment with the model that is exported; itself where nothing is merged."""
    if not isinstance(experiment, Merging):
        return experiment
    merge, build = experiment.merged, experiment.model
    merged = copy.copy(experiment)
    object.__setattr__(merged, "model", lambda: merge(build()))
    object.__setattr__(merged, APART, experiment)
    return merged


def model_apart(experiment: Experiment, champion: Path) -> nn.Module | None:
    """The trained model, where another one is exported in its place; None where it is itself.

    Its weights lie beside the champion's file, where ``write_exported`` wrote them.
    """
    apart: Experiment | None = getattr(experiment, APART, None)
    return load_champion(champion.with_name(APART_NAME), apart.model()) if apart else None


def is_as_trained(experiment: Experiment, config: CheckpointConfig) -> bool:
    """Whether the champion's file holds the very weights that are exported."""
    return config.frozen == "kept" and not isinstance(experiment, Merging)


def write_exported(
    experiment: Experiment,
    weights: Mapping[str, Tensor],
    config: CheckpointConfig,
    checkpoint: Path | None,
    folder: Path,
) -> Path:
    """Write the weights of the model that is exported; where it is merged, the trained ones, too.

    Args:
        experiment: the run's own.
        weights: the champion's, without what ``config`` leaves out.
        config: says whether frozen parameters were left out.
        checkpoint: a full one of the run, whose digest of them is compared.
        folder: where the files are made anew.

    Raises:
        ExportError: ``merged`` did not return a module.
        UnsupportedStateError: a module keeps extra state that is not JSON.
        CheckpointMismatchError: the weights are not of this model, or of this base.
    """
    apart = folder / APART_NAME
    apart.unlink(missing_ok=True)
    if is_as_trained(experiment, config):
        write_weights(apart, weights, _as_json(recorded_extra_state(checkpoint)))
        return apart
    model = experiment.model()
    load_saved(model, weights, config, checkpoint)
    _write_model(apart, model)
    if not isinstance(experiment, Merging):
        return apart
    merged: object = experiment.merged(model)
    if not isinstance(merged, nn.Module):
        raise ExportError(
            f"{type(experiment).__name__}.merged must return a module, found {kind_of(merged)}"
        )
    path = folder / MERGED_NAME
    path.unlink(missing_ok=True)
    _write_model(path, merged)
    return path


def _write_model(path: Path, model: nn.Module) -> None:
    tensors, extra_state = split_state(model.state_dict())
    write_weights(path, tensors, _as_json(extra_state))


def _as_json(extra_state: Mapping[str, Any]) -> dict[str, Json]:
    """Raise UnsupportedStateError for what a file of weights can't hold."""
    tensors: dict[str, Tensor] = {}
    encoded = {
        name: encode(value, name, tensors, keeps_order=True) for name, value in extra_state.items()
    }
    if tensors:
        raise UnsupportedStateError(
            f"get_extra_state() holds a tensor, {next(iter(tensors))}; candidates and bundles "
            "take numbers, text, lists and dicts of it alone: keep tensors in buffers"
        )
    return encoded
