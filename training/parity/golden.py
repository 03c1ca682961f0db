"""Samples with the champion's answers that travel with the bundle.

A consumer's own runtime must give the expected outputs within the tolerances, which are the bounds
of parity. One sample holds a NaN: its outputs must be NaN, and its neighbours must not care.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.training.configuration.schema import Json
from holdfast.training.experiment.protocol import example_inputs
from holdfast.training.loop.evaluation import as_arrays
from holdfast.training.parity.champion import Champion
from holdfast.training.parity.numbers import Reference, double_copy, make_reference
from holdfast.training.parity.probes import holed
from holdfast.training.runs.durable_json import write_json_durably

INT8_TOLERANCE = 0.25  # int8 kernels differ from CPU to CPU; a wrong model is further away


def write_golden(folder: Path, champion: Champion, num_samples: int) -> None:
    """Write ``<case>.<port>.npy`` for inputs and outputs, and ``golden.json`` with tolerances."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = example_inputs(champion.experiment, num_samples)
    cases = {"ordinary": rows, **champion.by_size}
    if any(tensor.is_floating_point() for tensor in rows) and num_samples > 1:
        cases["nan-row"] = holed(rows, float("nan"))
    exact = double_copy(champion.eager)
    entries: list[Json] = []
    for name, inputs in cases.items():
        reference = make_reference(champion.eager, exact, inputs)
        entries.append({"name": name, "tolerances": _tolerances(champion, reference)})
        _write_arrays(folder, name, champion, reference)
    write_json_durably(folder / "golden.json", {"cases": entries, "int8_tolerance": INT8_TOLERANCE})


def _tolerances(champion: Champion, reference: Reference) -> dict[str, Json]:
    """Largest scaled error of each output: ``max|found - expected| / max|expected|``."""
    ports = champion.interface.outputs
    return {port.name: bound for port, bound in zip(ports, reference.bounds, strict=True)}


def _write_arrays(folder: Path, case: str, champion: Champion, reference: Reference) -> None:
    for port, tensor in zip(champion.interface.inputs, reference.inputs, strict=True):
        np.save(folder / f"{case}.input.{port.name}.npy", _as_array(tensor), allow_pickle=False)
    pairs = zip(reference.exact, reference.eager, strict=True)
    for port, (exact, eager) in zip(champion.interface.outputs, pairs, strict=True):
        expected = exact.to(eager.dtype) if torch.is_floating_point(eager) else eager
        np.save(folder / f"{case}.output.{port.name}.npy", _as_array(expected), allow_pickle=False)


def _as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """As NumPy has it, which lacks bfloat16: that becomes fp32."""
    array: npt.NDArray[Any] = as_arrays({"": tensor})[""]
    return array
