"""evaluate(): a model's records on a data set, without a trace on training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.data import evaluation_batches
from training.experiment import Dataset, Experiment, Records, concatenate
from training.seeding import preserved_generators


def evaluate(
    experiment: Experiment,
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Records | None:
    """Records of every sample of a data set, in its order; None where ``should_stop`` said so.

    The model runs in evaluation mode and in fp32, as it will be exported, on the device where it
    is. Generators and the modes of all modules are put back, also after an error. ``should_stop``
    is asked between batches.
    """
    parts = []
    with preserved_generators(), evaluation_mode(model), torch.inference_mode():
        for batch in evaluation_batches(dataset, batch_size):
            if should_stop():
                return None
            parts.append(_score(experiment, model, batch))
    return concatenate(parts)


def evaluate_first_batch(
    experiment: Experiment, model: nn.Module, dataset: Dataset, *, batch_size: int
) -> Records:
    """As ``evaluate``, for the first batch alone: a look at whether scoring works at all."""
    with preserved_generators(), evaluation_mode(model), torch.inference_mode():
        return _score(experiment, model, next(iter(evaluation_batches(dataset, batch_size))))


def _score(experiment: Experiment, model: nn.Module, batch: Any) -> Records:
    records = experiment.score(model, move(batch, model_device(model)))
    return {name: value.cpu().numpy() for name, value in records.items()}


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
    if isinstance(batch, (tuple, list)):
        return type(batch)(move(item, device) for item in batch)
    if isinstance(batch, dict):
        return {key: move(value, device) for key, value in batch.items()}
    return batch
