"""How tensors are compared, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast.training.checkpointing.diff import compare_elements

NAN = float("nan")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, NAN], [1.0, NAN], (0, None, 0)),
        ([1.0, NAN], [1.5, 2.0], (2, 0.5, 1)),
        ([0.0, 3.0], [-0.0, 3.0], (1, 0.0, 0)),
        ([math.inf, 3.0], [1.0, 3.0], (1, math.inf, 0)),
        ([], [], (0, None, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_the_same_bytes_are_equal_and_nothing_else_is(
    a: list[float], b: list[float], expected: tuple[int, float | None, int], dtype: torch.dtype
) -> None:
    found = compare_elements(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
    assert (found["num_differing"], found["max_abs"], found["num_nan"]) == expected


def test_integers_are_told_apart_where_a_float_could_not() -> None:
    big = torch.tensor([2**60, 5])
    assert compare_elements(big, big + torch.tensor([1, 0]))["max_abs"] == 1.0
    flags = torch.tensor([True, False])
    assert compare_elements(flags, ~flags)["num_differing"] == 2


def test_differences_in_every_piece_of_a_large_tensor_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("holdfast.training.checkpointing.diff.CHUNK_ELEMENTS", 7)
    a = torch.arange(100.0).reshape(4, 25)
    b = a.clone()
    b[0, 3] += 1
    b[3, 24] -= 4
    found = compare_elements(a, b)
    assert (found["num_differing"], found["num_elements"], found["max_abs"]) == (2, 100, 4.0)
