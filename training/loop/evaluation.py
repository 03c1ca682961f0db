"""evaluate(): a model's records on a data set, without a trace on training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.training.data.loader import evaluation_batches
from holdfast.training.errors import ExperimentError, kind_of
from holdfast.training.exactness.seeding import preserved_generators, seed_scoring
from holdfast.training.experiment.nests import with_each
from holdfast.training.experiment.protocol import (
    Dataset,
    Experiment,
    MeasuredWhole,
    Records,
    concatenate,
)
from holdfast.training.loop.memory import tell_of_memory


class KeptRecords(Protocol):
    """Where an evaluation keeps what it has scored, so that another process can go on."""

    def load(self) -> Records | None:
        """Records of the first batches; None where there are none."""
        ...

    def offer(self, parts: Sequence[Records], is_last: bool) -> None:
        """All records so far. They may be kept, and must be where no more will be offered."""
        ...


class NotKept:
    """Records that are kept nowhere: an evaluation that was stopped begins anew."""

    def load(self) -> None:
        """There are none."""

    def offer(self, parts: Sequence[Records], is_last: bool) -> None:
        """They are not kept."""


def evaluate(
    experiment: Experiment,
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
    kept: KeptRecords = NotKept(),  # noqa: B008  # it has no state
    share: tuple[int, int] = (0, 1),
) -> Records | None:
    """Records of every sample of a data set, in its order; None where ``should_stop`` said so.

    The model runs in evaluation mode and in fp32, as it will be exported, on the device where it
    is. Generators and the modes of all modules are put back, also after an error. ``should_stop``
    is asked between batches.

    What a batch's scoring draws depends on its place in the data set alone. So the records are the
    same, whether or not another process began them and ``kept`` has the first batches. A ``share``
    of (k, n) is each n-th batch from the k-th on; one without a batch has no records.

    Raises:
        ExperimentError: the data set is empty, or ``score`` returned something else than one row
            per sample for each record.
        LoaderError: a sample could not be fetched.
        OutOfMemoryError: a batch is too large for this machine.
    """
    _require_samples(dataset)
    known = kept.load()
    if isinstance(dataset, MeasuredWhole):
        return _measured(dataset, model, known, kept)
    parts = [] if known is None else [known]
    (offset, every), done = share, 0 if known is None else -(-num_samples(known) // batch_size)
    first = offset + done * every
    numbers = itertools.count(first, every)
    batches = zip(numbers, evaluation_batches(dataset, batch_size, first, every), strict=False)
    with preserved_generators(), evaluation_mode(model), torch.no_grad():
        for number, batch in batches:
            if should_stop():
                kept.offer(parts, is_last=True)
                return None
            seed_scoring(number)
            num_in_batch = min(batch_size, len(dataset) - number * batch_size)
            parts.append(_score(experiment, model, batch, num_in_batch))
            _check_alike(experiment, parts[0], parts[-1])
            kept.offer(parts, is_last=False)
    kept.offer(parts, is_last=True)
    return concatenate(parts) if parts else {}


def _measured(
    dataset: MeasuredWhole, model: nn.Module, known: Records | None, kept: KeptRecords
) -> Records:
    if known is None:
        with preserved_generators(), evaluation_mode(model), torch.no_grad():
            seed_scoring(0)
            known = dataset.measured(model)
        kept.offer([known], is_last=True)
    return known


def num_samples(records: Records) -> int:
    """How many samples the records are of."""
    return len(next(iter(records.values())))


def metrics_of(experiment: Experiment, records: Records) -> dict[str, float]:
    """The experiment's metrics of records, each a float.

    Raises ExperimentError where they are not a dict of numbers.
    """
    metrics: object = experiment.metrics(records)
    method = f"{type(experiment).__name__}.metrics"
    if not isinstance(metrics, Mapping):
        raise ExperimentError(
            f"{method} must return a dict of numbers by name, such as {{'loss': 0.5}}; "
            f"it returned {_described(metrics)}"
        )
    return {str(name): _number(method, name, value) for name, value in metrics.items()}


def _number(method: str, name: str, value: object) -> float:
    is_scalar = isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0
    number = value.item() if is_scalar else value  # type: ignore[attr-defined]
    if not isinstance(number, (int, float)):
        raise ExperimentError(
            f"{method} must return a number for each metric; {name!r} is {_described(value)}: "
            f"reduce it to one, as by float(values.mean())"
        )
    return float(number)


def _require_samples(dataset: Dataset) -> None:
    if not len(dataset):
        raise ExperimentError(
            f"the data set to evaluate on, {kind_of(dataset)}, has no samples; expected at "
            f"least one in every split"
        )


def _score(experiment: Experiment, model: nn.Module, batch: Any, num_samples: int) -> Records:
    """Records as arrays."""
    try:
        records: object = experiment.score(model, move(batch, model_device(model)))
    except (MemoryError, RuntimeError) as error:
        tell_of_memory(
            error,
            f"the evaluation of {num_samples} samples",
            "write a smaller data.evaluation_batch_size under another run id",
        )
        raise
    method = f"{type(experiment).__name__}.score"
    if not isinstance(records, Mapping) or not records:
        raise ExperimentError(
            f"{method} must return a dict of tensors by name, with one row per sample; "
            f"it returned {_described(records)}"
        )
    for name, value in records.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != num_samples:
            raise ExperimentError(
                f"{method} must return tensors with one row per sample, [{num_samples}, ...] for "
                f"this batch; {name!r} is {_described(value)}"
            )
    return as_arrays(records)


def as_arrays(records: Mapping[str, Tensor]) -> Records:
    """Records as NumPy has them: bfloat16, which it lacks, becomes fp32, without a loss."""
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
        for name, value in records.items()
    }


def _check_alike(experiment: Experiment, first: Records, records: Records) -> None:
    """Raise ExperimentError where records of two batches cannot be put after each other."""
    shapes, found = (
        {name: list(rows.shape[1:]) for name, rows in part.items()} for part in (first, records)
    )
    if shapes != found:
        raise ExperimentError(
            f"{type(experiment).__name__}.score must return the same records for every batch, "
            f"with rows of one shape; the first batch had rows {shapes}, a later one {found}: "
            f"pad ragged rows to one length that doesn't depend on the batch"
        )


def _described(value: object) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "NumPy array"
        return f"a {kind} of shape {list(value.shape)}"
    if isinstance(value, (str, int, float, Mapping)) or value is None:
        return repr(value)[:80]
    return f"of type {type(value).__name__}"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode; afterwards each in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def model_device(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; ``cpu`` where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def move(batch: Any, device: torch.device) -> Any:
    """A nest of tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):  # what libraries collate to: packed sequences, encodings, graphs
        return batch.to(device)
    return with_each(lambda value: move(value, device), batch)
