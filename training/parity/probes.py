"""The inputs that parity is checked on, beyond the test set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from holdfast.training.export.specification import Inputs

BATCH_SIZES = (1, 3, 7, 33)
LARGE = 1e3
SATURATING = 1e6
HOLES = {
    "nan-row": math.nan,
    "infinity-row": math.inf,
    "minus-infinity-row": -math.inf,
}


def make_probes(rows: Inputs, own: Mapping[str, Inputs]) -> dict[str, Inputs]:
    """Named inputs, from ordinary ``rows`` (33 or more samples are taken from them, repeated).

    Batches of several sizes; zeros, large and saturating values in floating-point inputs; a NaN
    and both infinities in one sample among good ones; and the experiment's own probes.
    """
    probes = {f"batch-{size}": _rows(rows, size) for size in BATCH_SIZES}
    if any(tensor.is_floating_point() for tensor in rows):
        few = _rows(rows, 7)
        probes["zeros"] = _mapped(few, torch.zeros_like)
        probes["large"] = _mapped(few, lambda t: t * LARGE)
        probes["saturating"] = _mapped(few, lambda t: t * SATURATING)
        for name, value in HOLES.items():
            probes[name] = holed(few, value)
    return {**probes, **own}


def holed(inputs: Inputs, value: float) -> Inputs:
    """The same samples, but ``value`` in the second one, in every floating-point input."""
    return _mapped(inputs, partial(_with_hole, value=value))


def _rows(rows: Inputs, size: int) -> Inputs:
    chosen = torch.arange(size) % len(rows[0])
    return tuple(tensor[chosen] for tensor in rows)


def _mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return tuple(change(t) if t.is_floating_point() else t for t in inputs)


def _with_hole(tensor: Tensor, value: float) -> Tensor:
    """The second sample gets ``value`` as its last element."""
    changed = tensor.clone()
    changed[1].view(-1)[-1] = value
    return changed
