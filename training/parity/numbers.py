"""How far an exported output may be from the champion's: a bound that each model measures itself.

A fixed tolerance is wrong both ways: it fails healthy models with large logits and passes a wrong
weight in small ones. The reference here is the champion in fp64. What fp32 PyTorch itself loses
against it, times 8, plus 32 units of rounding, is what any other fp32 runtime may lose.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.training.export.guard import DoublePrecision, GuardedModel
from holdfast.training.export.specification import Inputs

FP32_EPS = float(torch.finfo(torch.float32).eps)
ERROR_FACTOR = 8.0
NUM_EPS = 32.0
EXACT_SAMPLES = 33  # as many as the largest of the probes has
NUM_AT_ONCE = 2**20
ALONE_ERROR = 1e-4  # far above rounding, far below what another sample would change


@dataclass(frozen=True)
class Reference:
    """The champion's answer to one input.

    Attributes:
        exact: outputs of the fp64 copy.
        eager: outputs of fp32 PyTorch.
        bounds: largest scaled error of each output.
    """

    inputs: Inputs
    exact: list[Tensor]
    eager: list[Tensor]
    bounds: list[float]


@dataclass(frozen=True)
class Comparison:
    """One output of an artifact against the reference.

    Attributes:
        error: scaled error; infinite where shapes, types or the places of NaN differ.
        reason: what is wrong, empty where nothing is.
    """

    error: float
    bound: float
    reason: str = ""

    @property
    def is_good(self) -> bool:
        """The error is within the bound."""
        return not self.reason and self.error <= self.bound


def double_copy(model: GuardedModel) -> GuardedModel:
    """The same model in fp64."""
    return copy.deepcopy(model).double()


def make_reference(eager: GuardedModel, exact: GuardedModel, inputs: Inputs) -> Reference:
    """Both answers to ``inputs``, and the bounds that follow from their difference.

    The fp64 copy answers to few samples at a time: what lies between its layers takes twice the
    memory that it takes in the model itself, and would be the most that a check needs.
    """
    answers: list[list[Tensor]] = []
    with torch.no_grad():
        eager_outputs = list(eager(*inputs))
        parts = _parts(len(inputs[0]) if _is_answered_alone(eager, inputs, eager_outputs) else 0)
        for part in parts:
            few = [t[part].double() if t.is_floating_point() else t[part] for t in inputs]
            with DoublePrecision():
                answers.append(list(exact(*few)))
    # One output after the other: what is joined is not held in its parts as well.
    exact_outputs = [torch.cat([each.pop(0) for each in answers]) for _ in range(len(answers[0]))]
    bounds = [
        ERROR_FACTOR * scaled_error(mine, true) + NUM_EPS * FP32_EPS
        for mine, true in zip(eager_outputs, exact_outputs, strict=True)
    ]
    return Reference(inputs, exact_outputs, eager_outputs, bounds)


def _is_answered_alone(eager: GuardedModel, inputs: Inputs, outputs: Sequence[Tensor]) -> bool:
    """Whether the first samples have the same answers and shapes without the others.

    A model may mix the samples of a batch; then the fp64 copy has to see all of them.
    """
    first, num_samples = slice(EXACT_SAMPLES), len(inputs[0])
    if num_samples <= EXACT_SAMPLES:
        return False  # they are few already
    if any(len(tensor) != num_samples for tensor in (*inputs, *outputs)):
        return False
    alone = list(eager(*(tensor[first] for tensor in inputs)))
    return all(
        mine.shape == all_of_them[first].shape
        and scaled_error(mine, all_of_them[first]) <= ALONE_ERROR
        for mine, all_of_them in zip(alone, outputs, strict=True)
    )


def _parts(num_samples: int) -> list[slice]:
    """Samples that are answered at a time; all of them where it says 0."""
    if num_samples <= EXACT_SAMPLES:
        return [slice(None)]
    starts = range(0, num_samples, EXACT_SAMPLES)
    return [slice(start, start + EXACT_SAMPLES) for start in starts]


def scaled_error(found: Tensor, true: Tensor) -> float:
    """``max|found - true| / max|true|`` over the places where both are finite; shapes are equal.

    Taken of some numbers after the others: copies of all of them would be the most that a check
    needs.
    """
    error, scale = 0.0, 0.0
    both = zip(*(torch.split(t.reshape(-1), NUM_AT_ONCE) for t in (found, true)), strict=True)
    for mine, its in ((a.double(), b.double()) for a, b in both):
        finite = torch.isfinite(its) & torch.isfinite(mine)
        if bool(finite.any()):
            scale = max(scale, float(its[finite].abs().max()))
            error = max(error, float((mine - its)[finite].abs().max()))
    return error / (scale if scale > 0 else 1.0)


def compare(found: list[Tensor], reference: Reference) -> list[Comparison]:
    """One comparison for each output; a wrong number of outputs is an error of all of them."""
    if len(found) != len(reference.eager):
        reason = f"{len(found)} outputs instead of {len(reference.eager)}"
        return [Comparison(math.inf, bound, reason) for bound in reference.bounds]
    return [
        _compare_one(mine, eager, true, bound)
        for mine, eager, true, bound in zip(
            found, reference.eager, reference.exact, reference.bounds, strict=True
        )
    ]


def perturbed_copy(model: GuardedModel, relative_noise: float) -> GuardedModel:
    """The same model with noise on every weight: what a comparison must be able to notice."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                scale = relative_noise * float(parameter.abs().max())
                parameter.add_((noise * scale).to(parameter.dtype))
    return noisy


def different_tensors(
    champion: Iterable[tuple[str, Tensor]],
    found: Mapping[str, Tensor],
    names: Mapping[str, list[str]],
) -> tuple[int, list[str]]:
    """How many floating-point tensors the champion has, and names of those not there bit by bit.

    ``names``: for tied tensors, the other names under which a tensor may stand. In memory is one
    of each side at a time, where they are read when they are asked for.
    """
    num, wrong = 0, []
    for name, tensor in champion:
        if tensor.is_floating_point():
            num += 1
            candidates = [n for n in names.get(name, [name]) if n in found]
            if not any(_is_identical(tensor, found[n]) for n in candidates):
                wrong.append(name if candidates else f"{name} (missing)")
    return num, sorted(wrong)


def _is_identical(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    as_bytes = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(as_bytes[0], as_bytes[1])


def _compare_one(found: Tensor, eager: Tensor, true: Tensor, bound: float) -> Comparison:
    if found.shape != eager.shape:
        reason = f"shape {list(found.shape)} instead of {list(eager.shape)}"
        return Comparison(math.inf, bound, reason)
    if found.dtype != eager.dtype:
        return Comparison(math.inf, bound, f"{found.dtype} instead of {eager.dtype}")
    if not found.is_floating_point():
        num_wrong = int((found != eager).sum())
        reason = f"{num_wrong} of {found.numel()} values differ" if num_wrong else ""
        return Comparison(float(num_wrong), 0.0, reason)
    if not torch.equal(torch.isfinite(found), torch.isfinite(eager)):
        reason = "NaN or infinity in other places than the champion's"
        return Comparison(math.inf, bound, reason)
    error = scaled_error(found, true)
    return Comparison(error, bound, "" if error <= bound else "outside the bound")
