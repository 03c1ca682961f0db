"""Averages of any length, reconstructed after training from snapshots of power-function averages.

Karras, Aittala, Lehtinen, Hellsten, Aila, Laine: "Analyzing and Improving the Training Dynamics of
Diffusion Models" (2024, arXiv:2312.02696), section 3 and appendix C. An average with the profile
p(s) = (gamma + 1) s**gamma / t**(gamma + 1), 0 <= s <= t, over the weights of the steps up to t is
approximated by a sum of snapshots, whose profiles are of the same kind. The coefficients minimise
the squared distance of the profiles, and add up to 1, so that weights that do not change are
reconstructed exactly; the paper leaves the sum free, which costs 4 to 7 times the error.

Everything here is arithmetic on (gamma, step): no weights are read, and any set of snapshots
will do, so a lost one costs accuracy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.training.errors import InputError, SelectionError

Float64Array = npt.NDArray[np.float64]

# Directions in which profiles hardly differ are left out: their coefficients would be huge, and
# multiply the rounding errors of fp32 snapshots.
SMALLEST_SINGULAR_VALUE = 1e-10


@dataclass(frozen=True, order=True)
class Profile:
    """A power-function average with exponent ``gamma`` over the first ``step`` steps."""

    step: int
    gamma: float


def power_weight(gamma: float, step: int) -> float:
    """What the weights after ``step`` steps (1 is the first) count: 1 - (1 - 1/step)**(gamma + 1).

    A recursion with it weighs step s of t exactly with the integral of the profile from s - 1 to s.
    """
    return 1.0 if step == 1 else -math.expm1((gamma + 1.0) * math.log1p(-1.0 / step))


def relative_width(gamma: float) -> float:
    """The standard deviation of a profile, as a fraction of its length (sigma_rel of the paper)."""
    return math.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))


def gamma_of(width: float) -> float:
    """The exponent whose profile has this relative width, the inverse of ``relative_width``.

    Raises InputError outside of (0, 0.28]: a profile of width 0.28 is nearly flat.
    """
    if not 0.0 < width <= 0.28:
        raise InputError(f"a relative width must lie in (0, 0.28], found {width}")
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def coefficients(snapshots: Sequence[Profile], target: Profile) -> dict[Profile, float]:
    """What each snapshot counts in the reconstruction of ``target``; they add up to 1.

    Snapshots of later steps than the target's are left out. Raises SelectionError where there is
    none left, or where one stands twice.
    """
    usable = sorted(profile for profile in snapshots if profile.step <= target.step)
    if not usable or len(set(usable)) != len(usable):
        raise SelectionError(
            f"an average up to step {target.step} needs different snapshots at or before it, "
            f"found {sorted(snapshots)}"
        )
    products = _products(usable, usable)
    scale = 1.0 / np.sqrt(np.diag(products))
    solution = _constrained_minimum(
        products * np.outer(scale, scale), _products(usable, [target])[:, 0] * scale, scale
    )
    return dict(zip(usable, (solution * scale).tolist(), strict=True))


def reconstruct(
    snapshots: Sequence[Profile], target: Profile, max_error: float
) -> dict[Profile, float]:
    """As ``coefficients``; SelectionError also where ``reconstruction_error`` is too large."""
    found = coefficients(snapshots, target)
    error = reconstruction_error(snapshots, target)
    if error > max_error:
        raise SelectionError(
            f"an average of relative width {relative_width(target.gamma):.3g} up to step "
            f"{target.step} cannot be had from the {len(snapshots)} snapshots of steps "
            f"{sorted({profile.step for profile in snapshots})}: its profile would be off by "
            f"{error:.4f} of its size, at most {max_error:g} is allowed; keep snapshots more "
            "often, or take other widths or gammas"
        )
    return found


def reconstruction_error(snapshots: Sequence[Profile], target: Profile) -> float:
    """Distance of the reconstructed profile from the target's, relative to the target's norm."""
    found = coefficients(snapshots, target)
    profiles, x = list(found), np.array(list(found.values()))
    norm = float(_products([target], [target])[0, 0])
    square = (
        x @ _products(profiles, profiles) @ x - 2 * x @ _products(profiles, [target])[:, 0] + norm
    )
    return math.sqrt(max(float(square), 0.0) / norm)


def combine(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of snapshots of one tensor, summed in fp64; the last one's type.

    ``tensors`` are ordered by step; integer and boolean ones are copied from the last.
    """
    last = tensors[-1]
    if not last.is_floating_point():
        return last.clone()
    total = torch.zeros(last.shape, dtype=torch.float64, device=last.device)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(torch.float64), alpha=weight)
    return total.to(last.dtype)


def _products(rows: Sequence[Profile], columns: Sequence[Profile]) -> Float64Array:
    """Inner products of profiles, the integrals of p_row(s) p_column(s) over s, [R, C]."""
    gamma_R1 = np.array([[profile.gamma] for profile in rows])
    step_R1 = np.array([[float(profile.step)] for profile in rows])
    gamma_1C = np.array([[profile.gamma for profile in columns]])
    step_1C = np.array([[float(profile.step) for profile in columns]])
    later = np.maximum(step_R1, step_1C)
    ratio = np.minimum(step_R1, step_1C) / later
    exponent = np.where(step_R1 > step_1C, gamma_R1, gamma_1C)  # gamma of the later one
    factor = (gamma_R1 + 1.0) * (gamma_1C + 1.0) / (gamma_R1 + gamma_1C + 1.0)
    result: Float64Array = factor * ratio**exponent / later
    return result


def _constrained_minimum(
    matrix_NN: Float64Array, target_N: Float64Array, constraint_N: Float64Array
) -> Float64Array:
    """The y that minimises y'Ay - 2b'y with c'y = 1."""
    start = constraint_N / (constraint_N @ constraint_N)
    basis, _ = np.linalg.qr(constraint_N[:, None], mode="complete")
    free_NM = basis[:, 1:]  # orthogonal to c
    inner = free_NM.T @ matrix_NN @ free_NM
    right = free_NM.T @ (target_N - matrix_NN @ start)
    solution, *_ = np.linalg.lstsq(inner, right, rcond=SMALLEST_SINGULAR_VALUE)
    result: Float64Array = start + free_NM @ solution
    return result
