from __future__ import annotations

import math

import pytest
import torch

from holdfast.training.checkpointing.finite import non_finite

BAD = (math.nan, math.inf, -math.inf)
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float8_e5m2])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 77, 1000, 4095):
        tensor = torch.ones(4096)
        tensor[place] = bad
        assert non_finite({"good": torch.ones(3), "bad": tensor.to(dtype)}) == ["bad"]


def test_the_largest_numbers_are_finite_and_sums_do_not_matter() -> None:
    tensors = {
        str(dtype): torch.full((1000,), torch.finfo(dtype).max, dtype=dtype) for dtype in TYPES[:4]
    }
    assert non_finite(tensors) == []


def test_what_has_no_infinity_is_left_alone() -> None:
    assert non_finite({"i": torch.ones(3, dtype=torch.int64), "e": torch.empty(0)}) == []


def test_the_order_is_that_of_the_names() -> None:
    bad = torch.tensor(math.nan)
    found = non_finite({"z": bad, "m": bad.double(), "a": bad.half(), "k": torch.ones(1)})
    assert found == ["z", "m", "a"]


def test_tensors_that_do_not_lie_in_order_are_read_as_they_are() -> None:
    base = torch.ones(4, 6)
    base[0, 5] = math.nan
    assert non_finite({"without": base[:, :5], "with": base.t()}) == ["with"]
