"""The bound that a model measures itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.training.export.guard import GuardedModel
from holdfast.training.parity import numbers
from holdfast.training.parity.numbers import (
    compare,
    different_tensors,
    double_copy,
    make_reference,
    scaled_error,
)


class HardCast(nn.Module):
    """Code that asks for fp32 by name, as user code does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.full((3,), 1 / 3, dtype=torch.float32)
        return self.layer(x.double().float()).to(torch.float32) + shift


def reference_of(model: nn.Module, inputs: Tensor):  # type: ignore[no-untyped-def]
    guarded = GuardedModel(model).eval()
    return make_reference(guarded, double_copy(guarded), (inputs,))


def test_the_reference_is_double_even_where_the_code_asks_for_single() -> None:
    reference = reference_of(HardCast(), torch.rand(5, 4))
    assert reference.exact[0].dtype == torch.float64
    assert 0 < scaled_error(reference.eager[0], reference.exact[0]) < 1e-6


class Counting(nn.Module):
    """Notes how many samples it is given, and mixes them or not."""

    def __init__(self, *, is_mixing: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.is_mixing = is_mixing
        self.given: list[tuple[torch.dtype, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append((x.dtype, len(x)))
        outputs: Tensor = self.layer(x)
        return outputs - outputs.mean(0) if self.is_mixing else outputs


@pytest.mark.parametrize(
    ("is_mixing", "num_samples", "parts"),
    [(False, 100, [33, 33, 33, 1]), (True, 100, [100]), (False, 33, [33]), (True, 2, [2])],
)
def test_the_double_copy_sees_few_samples_at_a_time_where_each_is_answered_alone(
    is_mixing: bool, num_samples: int, parts: list[int]
) -> None:
    torch.manual_seed(0)
    eager = GuardedModel(Counting(is_mixing=is_mixing)).eval()
    exact, inputs = double_copy(eager), torch.randn(num_samples, 4)
    reference = make_reference(eager, exact, (inputs,))
    inner = exact.model
    assert isinstance(inner, Counting)
    assert inner.given == [(torch.float64, num) for num in parts]
    with torch.no_grad():
        [whole], [answer] = exact(inputs.double()), eager(inputs)
    assert scaled_error(reference.exact[0], whole) < 1e-14
    assert compare([answer], reference)[0].is_good


@pytest.mark.parametrize("shape", [(0, 3), (1,), (7, 5), (3, 4, 6), ()])
@pytest.mark.parametrize("at_once", [1, 6, 1000])
def test_the_error_is_that_of_all_numbers_that_are_finite_on_both_sides(
    shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbers, "NUM_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        true = torch.randn(shape, generator=generator, dtype=torch.float64)
        found = (true + 1e-3 * torch.randn(shape, generator=generator)).float()
        for tensor, value in ((true, math.inf), (found, math.nan), (found, -math.inf)):
            tensor[torch.rand(shape, generator=generator) < 0.1] = value
        pairs = zip(found.flatten().tolist(), true.flatten().tolist(), strict=True)
        finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
        largest = max((abs(its) for _, its in finite), default=1.0)
        expected = max((abs(mine - its) for mine, its in finite), default=0.0) / largest
        assert scaled_error(found, true) == expected


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 1e6))
def test_the_bound_does_not_depend_on_the_scale_of_the_outputs(scale: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 4)
    with torch.no_grad():
        layer.weight *= scale
        layer.bias *= scale
    reference = reference_of(layer, torch.rand(9, 16))
    eager = reference.eager[0]
    assert compare([eager], reference)[0].is_good
    assert not compare([eager * (1 + 1e-4)], reference)[0].is_good


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t[:, :2], "shape"),
        (lambda t: t.double(), "float64"),
        (lambda t: t.index_fill(0, torch.tensor([1]), math.nan), "NaN or infinity"),
        (lambda t: t.flip(0), "outside the bound"),
    ],
)
def test_a_wrong_answer_has_a_reason(change, reason: str) -> None:  # type: ignore[no-untyped-def]
    reference = reference_of(nn.Linear(4, 3), torch.rand(5, 4))
    (answer,) = compare([change(reference.eager[0])], reference)
    assert not answer.is_good
    assert reason in answer.reason
    assert not compare([], reference)[0].is_good


def test_tensors_are_compared_bit_by_bit_and_by_name() -> None:
    champion = {"a": torch.tensor([0.0, 1.0]), "tied": torch.ones(2), "steps": torch.tensor(3)}
    names = {"tied": ["tied", "other"]}
    found = {"a": torch.tensor([-0.0, 1.0]), "other": torch.ones(2)}
    assert different_tensors(champion.items(), found, names) == (2, ["a"])
    only = {"a": champion["a"]}
    assert different_tensors(champion.items(), only, names) == (2, ["tied (missing)"])
