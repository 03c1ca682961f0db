"""Ranges and quantiles in one pass, in memory that does not grow with the data."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.training.export.specification import TensorSpec
from holdfast.training.parity.ranges import LEVELS, Distribution, num_columns


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_quantiles_are_right_to_one_part_in_128_at_any_scale(scale: float) -> None:
    values = scale * np.random.default_rng(0).standard_t(2, 100_000)
    found = Distribution(1)
    for part in np.array_split(values, 7):
        found.add(part)
    told = found.as_json()
    assert told["low"] == [values.min()]
    assert told["high"] == [values.max()]
    [quantiles] = told["quantiles"]
    wanted = np.quantile(values, LEVELS, method="inverted_cdf")
    assert np.all(np.abs(quantiles) <= np.abs(wanted)), "they are rounded towards zero"
    np.testing.assert_allclose(quantiles, wanted, rtol=1 / 128)


def test_the_order_of_the_samples_and_their_batches_do_not_matter() -> None:
    values = np.random.default_rng(1).normal(size=(1000, 3)).astype(np.float32)
    one, other = Distribution(3), Distribution(3)
    one.add(values)
    for row in values[::-1]:
        other.add(row[None])
    assert one.as_json() == other.as_json()


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float16, np.float64])
def test_numbers_of_every_type_are_counted(dtype: type) -> None:
    found = Distribution(1)
    found.add(np.arange(17).astype(dtype))
    told = found.as_json()
    assert (told["low"], told["high"]) == ([0.0], [16.0])
    assert told["quantiles"][0][LEVELS.index(0.5)] == 8.0


def test_what_is_no_number_is_counted_by_itself() -> None:
    found = Distribution(2)
    found.add(np.array([[1.0, np.nan], [-2.0, np.inf], [-0.0, np.nan]]))
    told = found.as_json()
    assert told["num_not_finite"] == 3
    assert (told["low"], told["high"]) == ([-2.0, None], [1.0, None])
    assert told["quantiles"][1] == [None] * len(LEVELS)


@pytest.mark.parametrize(
    ("dtype", "shape", "num"),
    [
        ("float32", (24,), 24),
        ("float32", (60, 24), 24),
        ("float32", ("length", 24), 24),
        ("float32", ("length",), 1),
        ("float32", (1000,), 1),
        ("float32", (1, 8, 8), 1),
        ("int64", (12,), 1),
        ("float32", (), 1),
    ],
)
def test_features_have_ranges_of_their_own(
    dtype: str, shape: tuple[int | str, ...], num: int
) -> None:
    assert num_columns(TensorSpec("x", dtype, shape)) == num
