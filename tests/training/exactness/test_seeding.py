"""Seeds, and the state of the global generators."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.errors import CheckpointMismatchError, UnsupportedStateError
from holdfast.training.exactness.seeding import (
    IsolatedGenerators,
    capture_generators,
    derive_seed,
    preserved_generators,
    restore_generators,
    seed_generators,
)


def draw() -> list[float]:
    """From each generator: one bounded, one uniform and one (of a pair of) normal number."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(np.random.randint(1000)),
        *torch.rand(3).tolist(),
        *torch.randn(3).tolist(),
    ]


paths = st.lists(st.integers() | st.text(), max_size=4)


@given(st.integers(), paths, paths)
def test_different_paths_give_different_seeds(
    root: int, one: list[int | str], other: list[int | str]
) -> None:
    assert (derive_seed(root, *one) == derive_seed(root, *other)) == (one == other)
    assert 0 <= derive_seed(root, *one) < 2**63


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, "order", 3) == 7213285133190870941


def test_a_capture_brings_every_generator_back_in_the_middle_of_a_pair_of_normals() -> None:
    seed_generators(1)
    draw()  # leaves a second normal number held back in random and in NumPy
    captured = capture_generators()
    expected = [draw() for _ in range(3)]
    seed_generators(2)
    restore_generators(captured)
    assert [draw() for _ in range(3)] == expected


def test_captures_of_equal_states_have_equal_bytes() -> None:
    seed_generators(1)
    one = capture_generators()
    draw()
    seed_generators(1)
    other = capture_generators()
    assert {n: t.numpy().tobytes() for n, t in one.items()} == {
        n: t.numpy().tobytes() for n, t in other.items()
    }


def test_preserved_generators_come_back_after_an_error() -> None:
    seed_generators(3)
    expected = draw()
    seed_generators(3)
    with pytest.raises(ZeroDivisionError), preserved_generators():
        _ = draw()[0] / 0
    assert draw() == expected


def test_a_missing_state_is_refused_by_name_and_nothing_changes() -> None:
    seed_generators(4)
    captured = capture_generators()
    expected = draw()
    restore_generators(captured)
    damaged = {name: tensor for name, tensor in captured.items() if name != "torch.cpu"}
    with pytest.raises(CheckpointMismatchError, match=r"lack torch\.cpu"):
        restore_generators(damaged)
    assert draw() == expected


def test_the_generator_of_a_missing_gpu_is_skipped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    captured = {**capture_generators(), "torch.cuda.99": torch.zeros(16, dtype=torch.uint8)}
    restore_generators(captured)
    assert "CUDA device 99, which this machine lacks" in caplog.text


def test_a_foreign_bit_generator_is_refused() -> None:
    own = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        with pytest.raises(UnsupportedStateError, match="expected MT19937"):
            capture_generators()
    finally:
        np.random.set_bit_generator(own)


@pytest.mark.parametrize("num_draws_before", [0, 1, 2])
@pytest.mark.parametrize("num_runs", [1, 3])
def test_an_isolated_run_leaves_the_surrounding_generators_untouched(
    num_draws_before: int, num_runs: int
) -> None:
    isolated = IsolatedGenerators()
    sequences = []
    for is_run in (False, True):
        seed_generators(5)
        drawn = []
        for _ in range(4):
            drawn += [float(np.random.randn()) for _ in range(num_draws_before)] + draw()
            for number in range(num_runs if is_run else 0):
                isolated.run(number, lambda _: draw(), None)
        sequences.append(drawn)
    assert sequences[0] == sequences[1]


def test_an_isolated_run_draws_by_its_seed_alone() -> None:
    isolated = IsolatedGenerators()
    expected = isolated.run(7, lambda _: draw(), None)
    draw()
    assert IsolatedGenerators().run(7, lambda _: draw(), None) == expected
    assert isolated.run(8, lambda _: draw(), None) != expected
    assert isolated.run(7, lambda _: draw(), None) == expected


def test_an_isolated_run_may_reseed_and_may_fail() -> None:
    def reseed_and_fail(_: None) -> None:
        seed_generators(0)
        draw()
        raise ZeroDivisionError

    seed_generators(6)
    np.random.randn()
    captured = capture_generators()
    with pytest.raises(ZeroDivisionError):
        IsolatedGenerators().run(1, reseed_and_fail, None)
    assert all(torch.equal(captured[n], t) for n, t in capture_generators().items())


def test_an_isolated_run_works_beside_a_foreign_bit_generator() -> None:
    own = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        isolated = IsolatedGenerators()
        np.random.randn()
        expected = np.random.RandomState(np.random.PCG64(0))
        expected.randn()
        isolated.run(1, lambda _: draw(), None)
        assert np.random.randn() == expected.randn()
    finally:
        np.random.set_bit_generator(own)
