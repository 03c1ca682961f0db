"""What a user writes: the Experiment protocol.

An experiment is a class with five methods. It is built from a ``Context`` and owns the model,
the data, the loss and the metrics; the optimizer, the scheduler and everything else are
configuration. Further methods are optional and found by their presence: ``parameter_groups``,
``rate_factor``, ``weight_decay_factor``, ``training_step`` and ``optimizers``, described below.

A *batch* is a pair ``(inputs, targets)``. ``inputs`` is a tensor or a tuple of tensors, the
positional arguments of ``model.forward``; or a dict of tensors, which are arguments of ``forward``
by name or, where it has no such arguments, its one argument. ``targets`` is any nest of tensors:
dicts, tuples, named tuples and dataclasses, to any depth. A batch may also be a tensor alone, which
is all inputs, or any nest whose inputs are named by ``input_names``. The first dimension of every
tensor counts samples. An item of a data set is the same for one sample; items are collated as
``torch.utils.data.default_collate`` does it, dataclasses as well, or by the data set's own
``collate(items)``.

What follows is optional and found by its presence:

- ``input_names: tuple[str, ...]``, a class attribute of the experiment: the keys of a batch that is
  a dict, or the fields of one that is a named tuple or dataclass, which the model takes by keyword;
- ``dynamic_dimensions: dict[str, dict[int, str]]``, another: dimensions beside the first one whose
  size may vary in exports, such as ``{"input_ids": {1: "length"}}``; sizes of one name are equal in
  one batch;
- ``loss(model, batch, at)``, with a parameter of that name: ``at`` is a ``TrainingPlace``;
- ``set_epoch(epoch)``, ``order(epoch)`` and ``weights(epoch)`` of a data set: see ``Dataset``.

Random augmentation belongs into the data set's ``__getitem__`` or ``fetch``. It may draw from
``random``, from NumPy's global generator and from torch: the loader seeds all three from (seed,
epoch, position). A data set must not keep state between two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.configuration.schema import Section, Split
from holdfast.training.errors import ExperimentError, kind_of
from holdfast.training.experiment.nests import children, default_collated, is_record

Batch = Any
"""``(inputs, targets)``, a tensor alone, or any nest with ``input_names``."""
Records = dict[str, npt.NDArray[Any]]
"""Name of a record to an array with one row per sample."""
REQUIRED_METHODS = ("dataset", "model", "loss", "score", "metrics")


class Dataset(Sized, Protocol):
    """Items by index. Optional attributes that are used where they exist:

    - ``collate(items: list) -> batch``: how items become a batch;
    - ``fetch(indices: list[int]) -> batch``: a whole batch at once, in the place of item by item
      and ``collate``; several times faster where data lies in memory as arrays;
    - ``fetch(indices: NDArray[int64]) -> batch``: several items at once, where that is faster;
    - ``lengths: Sequence[int]``: tokens of each item, for batches by token count;
    - ``set_epoch(epoch)``: called before the first fetch of an epoch, with its number from 0 on, in
      each process that fetches. A resume begins in any epoch: what is fetched depends on the last
      call alone. The length stays. Data that is evaluated on is not told;
    - ``order(epoch) -> indices``: the samples of a training epoch in their order, any number of
      them, in the place of a random permutation;
    - ``weights(epoch) -> numbers``: one for each sample, none of them negative. An epoch draws as
      many samples as there are, with replacement, in proportion to them.

    - ``permutation_by_key(key) -> order``: an epoch's order from its key, in the place of a random
      permutation, where memory and the cost of a place shall not grow with the data: ``order``
      takes ascending positions, int64, and gives the index of the sample at each. Every sample has
      one position. ``holdfast.StreamFiles`` has it.

    ``order`` and ``weights`` are functions of the epoch alone. They may draw from the global
    generators, which are seeded for each call.

    - ``fingerprint: str``: a digest of what the data set was made from.
    """

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class MeasuredWhole(Protocol):
    """A data set that measures a model by itself, in the place of ``score`` on its batches."""

    def measured(self, model: nn.Module) -> Records:
        """Records of all samples."""
        ...


class NoSettings(Section):
    """Settings of an experiment that has none."""


@dataclass(frozen=True)
class Context:
    """What an experiment is built from.

    Attributes:
        settings: the validated ``[experiment]`` table, an instance of the class's ``Settings``.
        data_folder: ``data.folder`` of the configuration.
        seed: derived from the run's root seed, for random splits and synthetic data.
    """

    settings: Any = field(default_factory=NoSettings)
    data_folder: Path | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainingPlace:
    """Where in the run a microbatch stands, as a resume finds it again.

    Attributes:
        seed: root seed of the run.
        epoch, step_in_epoch: from 0 on.
        step: optimizer steps that are done.
        microbatch: its number in the step, from 0 on.
        num_microbatches: of this step.
    """

    seed: int
    epoch: int
    step: int
    step_in_epoch: int
    microbatch: int
    num_microbatches: int


@runtime_checkable
class Experiment(Protocol):
    """Model, data, loss and metrics of one task.

    Three optional class attributes: ``Settings``, a ``holdfast.Section`` that validates the
    ``[experiment]`` table; ``defaults``, a nested mapping of configuration values that this
    experiment prefers to the general defaults; and ``resampling_unit``, the name of a record, such
    as an engine's number, whose equal values mark samples that are not independent of each other:
    intervals are then found by drawing engines, not samples.

    Two optional methods for a model on a frozen base (``checkpoint.frozen = "left_out"``):
    ``base_files()`` names what the base is read from, so that another base is refused, see
    ``holdfast.training.weights.identity``; ``merged(model)`` returns the model that is exported in
    the place of the trained one, see ``holdfast.training.parity.merging``.
    """

    def dataset(self, split: Split) -> Dataset:
        """The data of a split. ``test`` is asked for once, after the champion is chosen."""
        ...

    def model(self) -> nn.Module:
        """A freshly initialised model; torch's generators are seeded before the call.

        What the model needs to be used on raw inputs (scalers, vocabularies) are its buffers, so
        that every checkpoint and every export carries them.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar training loss of a microbatch, a mean over its samples.

        With a third parameter ``at`` it is given the ``TrainingPlace``, by keyword.
        """
        ...

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """One row per sample for each named record, e.g. ``loss`` [B] and ``prediction`` [B, C].

        The model is in evaluation mode and gradients are off. Rows of ragged results are padded
        to one length that doesn't depend on the batch.
        """
        ...

    def metrics(self, records: Records) -> dict[str, float]:
        """Metrics of a split from the records of all its samples, in the order of the data set."""
        ...


@runtime_checkable
class HasParameterGroups(Protocol):
    """Optional: groups of the configured optimizer, each with options of its own."""

    def parameter_groups(self, model: nn.Module) -> Iterable[Mapping[str, Any]]:
        """Dicts with ``name``, ``params`` and options, such as ``weight_decay``, that differ.

        Each trainable parameter is in one of them; frozen ones that will be trained may be, too.
        """
        ...


@runtime_checkable
class HasRateFactor(Protocol):
    """Optional: the learning rate as a function of the step, in the place of a scheduler."""

    def rate_factor(self, step: int) -> float | Mapping[str, float]:
        """What each group's first rate is multiplied with after ``step`` steps; 0 is the first.

        One number, or one for each group by its name. Depends on ``step`` alone.
        """
        ...


@runtime_checkable
class HasWeightDecayFactor(Protocol):
    """Optional: weight decay as a function of the step; goes with any scheduler."""

    def weight_decay_factor(self, step: int) -> float | Mapping[str, float]:
        """As ``rate_factor``, for each group's first ``weight_decay``."""
        ...


class WeightedBatch(NamedTuple):
    """A microbatch, and what its mean loss counts in the step's mean; weights add up to 1."""

    batch: Batch
    weight: float


class Step(Protocol):
    """One optimizer step, as ``training_step`` is given it.

    Attributes:
        microbatches: of the step, on the training device.
        seed: of this step alone: derived from the run's seed, ``epoch`` and ``step``.
        epoch: epochs that are finished.
        step: steps that are done.
    """

    microbatches: Sequence[WeightedBatch]
    seed: int
    epoch: int
    step: int

    def autocast(self) -> AbstractContextManager[object]:
        """What forward and loss are computed in, as ``train.precision`` says."""
        ...

    def backward(
        self, loss: Tensor, name: str | None = None, *, retain_graph: bool = False
    ) -> None:
        """Add the gradients of a loss, which must be finite; scaled with fp16.

        With the ``name`` of an optimizer, gradients of what it trains and of nothing else.
        ``retain_graph`` is torch's: for losses that have a forward pass in common.
        """
        ...

    def update(self, name: str | None = None, closure: Callable[[], Any] | None = None) -> Any:
        """Let an optimizer change its parameters, then clear their gradients.

        The only optimizer needs no name. ``train.clip_norm`` holds for each update. ``closure``
        computes the loss, calls ``backward`` and returns it, as often as the optimizer asks; it
        begins without gradients.
        """
        ...


@runtime_checkable
class HasTrainingStep(Protocol):
    """Optional: what a step does; ``loss`` is not needed then."""

    def training_step(self, model: nn.Module, step: Step) -> Tensor:
        """Compute losses, call ``step.backward`` and ``step.update``. Returns the loss to tell.

        Code after the last update sees the new weights: a teacher that follows them, a queue.
        What is kept is in the model, or in the experiment's own ``state_dict``.
        """
        ...


@runtime_checkable
class HasOptimizers(HasTrainingStep, Protocol):
    """Optional: optimizers of one's own, in the place of the configured one.

    A class attribute ``sharing_optimizers`` names those that may have parameters in common.
    """

    def optimizers(self, model: nn.Module) -> Mapping[str, Optimizer]:
        """Optimizers by name. Each trainable parameter is in one of them."""
        ...


def has_test_data(experiment: object) -> bool:
    """Whether there is a test split; a script with its own loop may have none."""
    return bool(getattr(experiment, "has_test", True))


def hook(experiment: object, name: str) -> Any:
    """An optional method of an experiment; None where its class has none of this name."""
    is_there = callable(getattr(type(experiment), name, None))
    return getattr(experiment, name) if is_there else None


def input_names(experiment: object) -> tuple[str, ...]:
    """The experiment's ``input_names``; none where it has none. Raises ExperimentError."""
    names: object = getattr(experiment, "input_names", ())
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise ExperimentError(
            f"input_names of {type(experiment).__name__} must be a tuple of names, such as "
            f'("input_ids", "attention_mask"); found {names!r}'
        )
    return tuple(names)


def model_inputs(batch: Batch, names: tuple[str, ...] = ()) -> tuple[Tensor, ...]:
    """The inputs of a batch, flat: what ``model.forward`` takes. A lone tensor is all inputs.

    ``names`` are the experiment's ``input_names``. Raises ExperimentError where there are no
    inputs, or they are no tensors.
    """
    inputs = inputs_of(batch, names)
    values = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
    flat = tuple(values) if isinstance(values, (tuple, list)) else (values,)
    if not flat or not all(isinstance(tensor, Tensor) for tensor in flat):
        kinds = ", ".join(type(value).__name__ for value in flat) or "nothing"
        raise ExperimentError(
            f"the inputs of a batch must be a tensor, a tuple of tensors or a dict of tensors; "
            f"found {kind_of(inputs)} of {kinds}"
        )
    return flat


def inputs_of(batch: Batch, names: tuple[str, ...] = ()) -> Any:
    """What of a batch the model takes: a tensor, a tuple, or a dict. Raises ExperimentError.

    With ``names`` it is a dict of these entries, or fields, of the batch or of its first part. One
    that is None is left out.
    """
    if not names:
        require_pair(batch)
        return batch if isinstance(batch, Tensor) else batch[0]
    parts = (batch, batch[0]) if isinstance(batch, (tuple, list)) and len(batch) else (batch,)
    for part in parts:
        is_named = isinstance(part, Mapping) or is_record(part)
        held = dict(children(part) or ()) if is_named else {}
        if held.keys() >= set(names):
            return {name: held[name] for name in names if held[name] is not None}
    raise ExperimentError(
        f"input_names names {', '.join(names)}; a batch must be a dict, named tuple or dataclass "
        f"that holds them, or a pair that begins with one; found {_described(batch)}"
    )


def require_pair(batch: object) -> None:
    """Make sure that it can be told which part of a batch are inputs. Raises ExperimentError."""
    if isinstance(batch, Tensor) or (isinstance(batch, (tuple, list)) and len(batch)):
        return
    raise ExperimentError(
        f"an item of a data set, and so a batch, must be a pair (inputs, targets); found "
        f"{_described(batch)}: return the model's inputs as one, which may be a dict, and all else "
        f"as the other, or name the model's inputs by the class attribute input_names"
    )


def _described(batch: object) -> str:
    """The kind of a batch, with the names in it."""
    held = children(batch) if isinstance(batch, Mapping) or is_record(batch) else None
    kind = "dict" if isinstance(batch, Mapping) else type(batch).__name__
    if held is None:
        return f"a {kind}"
    names = "keys" if isinstance(batch, Mapping) else "fields"
    return f"a {kind} with the {names} {', '.join(str(key) for key, _ in held)}"


def require_map_style(dataset: object, split: str) -> None:
    """Make sure that a data set has items by index. Raises ExperimentError."""
    from torch.utils.data import IterableDataset

    is_stream = isinstance(dataset, IterableDataset)
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if is_stream or missing:
        lacking = "is a stream" if is_stream else f"lacks {' and '.join(missing)}"
        raise ExperimentError(
            f"dataset({split!r}) must return a data set with __len__ and __getitem__, so that any "
            f"place of it can be gone back to; {type(dataset).__name__} {lacking}"
        )


def example_batch(experiment: Experiment, num_samples: int) -> Batch:
    """The first validation samples; where the split has fewer, it is repeated from its start.

    Raises ExperimentError where the split is empty.
    """
    dataset = experiment.dataset("validation")
    if not len(dataset):
        raise ExperimentError("dataset('validation') has no samples; expected at least one")
    return collate(dataset, [dataset[i % len(dataset)] for i in range(num_samples)])


def example_inputs(experiment: Experiment, num_samples: int) -> tuple[Tensor, ...]:
    """Inputs of the first validation samples, for tracing and exporting; see ``example_batch``."""
    return model_inputs(example_batch(experiment, num_samples), input_names(experiment))


def collate(dataset: Dataset, items: list[Any]) -> Batch:
    """Items as one batch, by the data set's own ``collate`` where it has one.

    A batch of tuples is a tuple; a dict, a named tuple, a dataclass or a single tensor stays what
    it is.
    """
    own = getattr(dataset, "collate", None)
    batch = own(items) if own is not None else default_collated(items)
    is_torn = own is None and type(batch) is list
    whole: Batch = tuple(batch) if is_torn else batch
    return whole


def concatenate(parts: list[dict[str, npt.NDArray[Any]]]) -> Records:
    """Records of consecutive batches as records of all their samples."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
