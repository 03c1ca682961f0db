"""Several checkpoints of one training as one model: the mean of what they return.

An ensemble of k members holds k models: its file, its memory and the time of a call are k times
those of one. Nothing of its members is changed, so statistics of batch norm are each one's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.averages.averaging import WeightsWriter
from holdfast.training.checkpointing.slices import MappedSlices, open_part
from holdfast.training.checkpointing.tensor_file import Layout, MappedFile, placed
from holdfast.training.errors import ConfigError
from holdfast.training.experiment.nests import leaves, mapped
from holdfast.training.experiment.protocol import Experiment

NAME = "ensemble-top-{num_members}"
PARSED = re.compile(r"ensemble-top-(\d+)")
MEMBERS = "members"


class Ensemble(nn.Module):
    """The mean of its members' outputs, tensor by tensor.

    Of an output that is no floating-point tensor, such as a class, it is the last member's. The
    names in its state dict are those of member i behind ``members.<i>.``; the members stand in the
    order of their steps.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What one member would return, as the mean of all of them."""
        return mean_of([member(*args, **kwargs) for member in self.members])

    def called_like(self) -> nn.Module:
        """The module whose ``forward`` says what this one takes."""
        return self.members[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"an ensemble has no {name!r}, as its members may have: it can only be called; let "
                f"score() call the model, or leave 'ensemble' out of selection.candidates"
            ) from None


def mean_of(returned: Sequence[Any]) -> Any:
    """The mean of several nests of one structure, as Ensemble describes it."""
    columns = zip(*([leaf for _, leaf in leaves(one)] for one in returned), strict=True)
    return mapped(lambda _: _mean(next(columns)), returned[-1])


def num_members(candidate: str) -> int | None:
    """How many models the candidate of this name holds; None where it is one model."""
    found = PARSED.fullmatch(candidate)
    return int(found[1]) if found else None


def experiment_of(experiment: Experiment, candidate: str) -> Experiment:
    """The experiment whose ``model()`` is built as the candidate of this name is.

    Of an ensemble that is a copy: model, and so every export and check, hold its members.
    """
    num = num_members(candidate)
    if num is None:
        return experiment
    copied: Experiment = object.__new__(type(experiment))
    vars(copied).update(vars(experiment))
    object.__setattr__(copied, "model", partial(_build, experiment, num))
    return copied


def require_one_graph(experiment: Experiment, frozen: str = "kept") -> None:
    """Raise ConfigError for a model that cannot be an ensemble: one of several graphs, or in parts.

    ``frozen`` is ``checkpoint.frozen``.
    """
    if frozen == "left_out" or hasattr(experiment, "merged"):
        raise ConfigError(
            "selection.candidates names 'ensemble', and the weights of a candidate are not all of "
            "its model (checkpoint.frozen = 'left_out', or merged(model)): leave 'ensemble' out"
        )
    if hasattr(experiment, "export_parts"):
        raise ConfigError(
            f"selection.candidates names 'ensemble', and the model of {type(experiment).__name__} "
            f"is served as several graphs (export_parts): what they return step by step has no "
            f"mean; leave 'ensemble' out"
        )


def write_ensemble(target: Path, members: Sequence[Path]) -> str:
    """Write the weights of several files as those of an ensemble, and return the file's digest.

    In memory is one tensor at a time. Raises CheckpointCorruptError or StorageError.
    """
    files = {f"{MEMBERS}.{number}.": open_part(path) for number, path in enumerate(members)}
    places = {
        f"{prefix}{name}": (file, name)
        for prefix, file in files.items()
        for name in file.layout.slots
    }
    aliases = {
        f"{prefix}{name}": f"{prefix}{stored}"
        for prefix, file in files.items()
        for name, stored in file.layout.aliases.items()
    }
    slots = {name: file.layout.slots[own] for name, (file, own) in places.items()}
    layout = Layout(placed({n: (slot.dtype, slot.shape) for n, slot in slots.items()}), aliases)
    tensors = (_released(*places[name]) for name in layout.slots)
    return WeightsWriter(target, layout).write(chain.from_iterable(tensors))


def _released(file: MappedFile | MappedSlices, name: str) -> Iterator[Tensor]:
    """A tensor, which is let go of when the next one is asked for."""
    tensor = file.tensor(name)
    yield tensor
    if tensor.numel():
        file.release(name, 0, tensor.numel())


def _mean(column: Sequence[Any]) -> Any:
    last = column[-1]
    is_mean = isinstance(last, Tensor) and (last.is_floating_point() or last.is_complex())
    return torch.stack([*column]).mean(0) if is_mean else last


def _build(experiment: Experiment, num: int) -> nn.Module:
    return Ensemble(experiment.model() for _ in range(num))
