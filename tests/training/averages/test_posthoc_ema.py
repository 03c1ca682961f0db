"""Averages of any length from snapshots of power-function averages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.averages.posthoc_ema import (
    Profile,
    coefficients,
    combine,
    gamma_of,
    power_weight,
    reconstruction_error,
    relative_width,
)
from holdfast.training.errors import InputError, SelectionError

LAST_STEP = 600
TRACKS = (gamma_of(0.05), gamma_of(0.10))


def average(weights_TD: np.ndarray, gamma: float) -> np.ndarray:
    """The power-function average of all rows, by its recursion; one row per step, [T, D]."""
    averages, current = [], np.zeros(weights_TD.shape[1])
    for step, weights in enumerate(weights_TD, start=1):
        current = current + power_weight(gamma, step) * (weights - current)
        averages.append(current)
    return np.array(averages)


def snapshots_every(num_steps: int, last_step: int = LAST_STEP) -> list[Profile]:
    steps = range(num_steps, last_step + 1, num_steps)
    return [Profile(step, gamma) for step in steps for gamma in TRACKS]


@pytest.fixture(scope="module")
def walk() -> np.ndarray:
    """Weights that drift and tremble, [T, D]."""
    random = np.random.RandomState(0)
    drift = np.sqrt(np.arange(1, LAST_STEP + 1))[:, None] * random.randn(1, 8)
    return drift + random.randn(LAST_STEP, 8)


def reconstruct(walk: np.ndarray, snapshots: list[Profile], target: Profile) -> np.ndarray:
    tracks = {gamma: average(walk, gamma) for gamma in {p.gamma for p in snapshots}}
    found = coefficients(snapshots, target)
    return np.sum([w * tracks[p.gamma][p.step - 1] for p, w in found.items()], axis=0)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_recursion_weighs_each_step_with_the_integral_of_the_profile() -> None:
    gamma, num_steps = 6.94, 50
    weights = average(np.eye(num_steps), gamma)[-1]
    edges = (np.arange(num_steps + 1) / num_steps) ** (gamma + 1)
    assert weights == pytest.approx(np.diff(edges), rel=1e-12)


def test_the_exponents_of_the_paper() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@given(st.floats(0.001, 0.28))
def test_width_and_exponent_are_each_others_inverse(width: float) -> None:
    assert relative_width(gamma_of(width)) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("width", [0.0, 0.3, float("nan")])
def test_a_width_without_a_profile_is_refused(width: float) -> None:
    with pytest.raises(InputError, match="relative width"):
        gamma_of(width)


@pytest.mark.parametrize("width", [0.04, 0.05, 0.07, 0.1, 0.13])
def test_any_length_is_reconstructed_from_two_tracks(walk: np.ndarray, width: float) -> None:
    target = Profile(LAST_STEP, gamma_of(width))
    expected = average(walk, target.gamma)[-1]
    assert relative_error(reconstruct(walk, snapshots_every(20), target), expected) < 5e-3


def test_an_average_that_ends_earlier_is_reconstructed(walk: np.ndarray) -> None:
    target = Profile(440, gamma_of(0.08))
    expected = average(walk, target.gamma)[target.step - 1]
    assert relative_error(reconstruct(walk, snapshots_every(20), target), expected) < 5e-3


def test_a_snapshot_that_is_the_target_is_taken_alone() -> None:
    target = Profile(LAST_STEP, TRACKS[0])
    found = coefficients(snapshots_every(40), target)
    assert found.pop(target) == pytest.approx(1.0, abs=1e-3)
    assert max(map(abs, found.values())) < 1e-3


@given(
    lost=st.sets(st.integers(0, 59), max_size=58),
    width=st.floats(0.02, 0.25),
    step=st.integers(300, LAST_STEP),
)
def test_coefficients_add_up_to_one_whatever_is_lost(
    lost: set[int], width: float, step: int
) -> None:
    left = [p for i, p in enumerate(snapshots_every(20)) if i not in lost]
    if not any(p.step <= step for p in left):
        return
    found = coefficients(left, Profile(step, gamma_of(width)))
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-9)
    assert all(p.step <= step for p in found)
    assert max(map(abs, found.values())) < 100


def test_a_quarter_of_the_snapshots_may_be_lost(walk: np.ndarray) -> None:
    random = np.random.RandomState(1)
    snapshots = snapshots_every(20)
    kept = [snapshots[i] for i in np.sort(random.permutation(60)[:45])]
    target = Profile(LAST_STEP, gamma_of(0.08))
    expected = average(walk, target.gamma)[-1]
    assert relative_error(reconstruct(walk, kept, target), expected) < 5e-3


def test_the_error_is_known_without_weights() -> None:
    target = Profile(LAST_STEP, gamma_of(0.08))
    coarse, fine = (reconstruction_error(snapshots_every(n), target) for n in (100, 20))
    assert fine < coarse / 5
    assert reconstruction_error(snapshots_every(20), Profile(LAST_STEP, TRACKS[1])) < 1e-4


@pytest.mark.parametrize("snapshots", [[], [Profile(9, 5.0)], [Profile(3, 5.0)] * 2])
def test_nothing_to_reconstruct_from_is_refused(snapshots: list[Profile]) -> None:
    with pytest.raises(SelectionError, match="up to step 5"):
        coefficients(snapshots, Profile(5, 7.0))


def test_tensors_are_combined_in_fp64_and_integers_are_the_newest() -> None:
    tensors = [torch.full((3,), 0.1), torch.full((3,), 0.1), torch.full((3,), 0.1)]
    assert torch.equal(combine(tensors, [0.3, 0.3, 0.4]), tensors[0])
    numbers = [torch.tensor([1]), torch.tensor([7])]
    assert combine(numbers, [0.5, 0.5]).tolist() == [7]
