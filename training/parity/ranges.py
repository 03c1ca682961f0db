"""What validation data look like: the range and the quantiles of each input and output.

``ranges.json`` of a bundle; ``predict`` warns of what lies outside. One pass, in memory that does
not grow with the data: values are counted in bins, one for each number of 8 significant bits (those
of bfloat16), so a quantile is right to 1 part in 128, whatever the scale, and does not depend on
the order of the samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.training.data.loader import evaluation_batches
from holdfast.training.exactness.seeding import preserved_generators
from holdfast.training.experiment.protocol import MeasuredWhole, input_names, model_inputs
from holdfast.training.export.specification import Inputs, TensorSpec
from holdfast.training.loop.evaluation import as_arrays
from holdfast.training.parity.champion import Champion, RunnerModule
from holdfast.training.runs.durable_json import write_json_durably

RANGES = "ranges.json"
LEVELS = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
NUM_BINS = 1 << 16
DROPPED_BITS = 16  # of fp32's 32
SIGN = np.uint32(1 << 31)
MAX_COLUMNS = 64
LARGEST = float(np.finfo(np.float32).max)


class Distribution:
    """Values that were seen, column by column: their range, their quantiles, how many were none."""

    def __init__(self, num_columns: int) -> None:
        self._counts = np.zeros((num_columns, NUM_BINS), dtype=np.int64)
        self._low = np.full(num_columns, np.inf)
        self._high = np.full(num_columns, -np.inf)
        self._num_not_finite = 0

    def add(self, values: npt.NDArray[Any]) -> None:
        """Take numbers; their last dimension is the columns where there are several."""
        table = values.reshape(-1, len(self._low)).astype(np.float64)
        for column, found in enumerate(table.T):
            finite = found[np.isfinite(found)]
            self._num_not_finite += len(found) - len(finite)
            if len(finite):
                self._low[column] = min(self._low[column], finite.min())
                self._high[column] = max(self._high[column], finite.max())
                self._counts[column] += np.bincount(_bins(finite), minlength=NUM_BINS)

    def as_json(self) -> dict[str, Any]:
        """For ``ranges.json``; a column without a number has nulls."""
        columns = range(len(self._low))
        return {
            "high": [_number(self._high[column]) for column in columns],
            "low": [_number(self._low[column]) for column in columns],
            "num_not_finite": self._num_not_finite,
            "quantiles": [[self._quantile(column, q) for q in LEVELS] for column in columns],
        }

    def _quantile(self, column: int, level: float) -> float | None:
        """The smallest value that so large a part of all is not above, rounded towards zero."""
        total = np.cumsum(self._counts[column])
        if not total[-1]:
            return None
        value = _value(int(np.searchsorted(total, level * total[-1])))
        return float(np.clip(value, self._low[column], self._high[column]))


def write_ranges(path: Path, champion: Champion) -> None:
    """Write what validation samples and the champion's answers to them look like."""
    interface = champion.interface
    inputs, outputs = map(_distributions, (interface.inputs, interface.outputs))
    dataset = champion.experiment.dataset("validation")
    names = input_names(champion.experiment)
    num_samples = 0

    def answer(given: Inputs) -> list[Tensor]:
        nonlocal num_samples
        num_samples += len(given[0])
        answers = list(champion.eager(*given))
        _add(inputs, interface.inputs, given)
        _add(outputs, interface.outputs, answers)
        return answers

    with preserved_generators(), torch.no_grad():
        if isinstance(dataset, MeasuredWhole):
            dataset.measured(RunnerModule(answer, interface))
        else:
            for batch in evaluation_batches(dataset, champion.batch_size):
                answer(model_inputs(batch, names))
    write_json_durably(
        path,
        {
            "format_version": 1,
            "inputs": {name: found.as_json() for name, found in inputs.items()},
            "levels": list(LEVELS),
            "num_samples": num_samples,
            "outputs": {name: found.as_json() for name, found in outputs.items()},
        },
    )


def num_columns(port: TensorSpec) -> int:
    """How many columns of a port have a range of their own; 1 where all values have one together.

    A sample's last dimension is taken for its features where it is a vector or a sequence of them.
    """
    last = port.shape[-1] if len(port.shape) in (1, 2) and "float" in port.dtype else None
    return last if isinstance(last, int) and 0 < last <= MAX_COLUMNS else 1  # else it may vary


def _distributions(ports: Iterable[TensorSpec]) -> dict[str, Distribution]:
    """Of those that hold numbers: neither booleans nor complex numbers."""
    numeric = [port for port in ports if "float" in port.dtype or "int" in port.dtype]
    return {port.name: Distribution(num_columns(port)) for port in numeric}


def _add(
    found: dict[str, Distribution], ports: Iterable[TensorSpec], tensors: Iterable[Tensor]
) -> None:
    for port, tensor in zip(ports, tensors, strict=True):
        if port.name in found:
            found[port.name].add(as_arrays({"": tensor})[""])


def _bins(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The bins of finite numbers; a larger number is in no smaller bin."""
    single = np.clip(values, -LARGEST, LARGEST).astype(np.float32) + np.float32(0.0)  # no -0.0
    bits = single.view(np.uint32)
    ordered = np.where(bits & SIGN, ~bits, bits | SIGN)
    return (ordered >> np.uint32(DROPPED_BITS)).astype(np.int64)


def _value(number: int) -> float:
    """The number of a bin that is nearest to zero."""
    is_negative = number < NUM_BINS // 2
    ordered = (number << DROPPED_BITS) | ((1 << DROPPED_BITS) - 1 if is_negative else 0)
    bits = ~ordered & 0xFFFFFFFF if is_negative else ordered & 0x7FFFFFFF
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
