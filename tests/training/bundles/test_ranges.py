"""What ``predict`` says about inputs and outputs that validation data did not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.training.bundles.consumer import RANGES, RefusedBundleError, range_warnings
from holdfast.training.parity.ranges import LEVELS, Distribution

PORT = {"name": "points", "dtype": "float32", "shape": [2]}
SEEN = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32)


def warnings(folder: Path, values: Any, *, dtype: str = "float32") -> list[str]:
    """Of a bundle whose one input had the values of SEEN; there are no outputs."""
    found = Distribution(2)
    found.add(SEEN)
    ranges = {"inputs": {"points": found.as_json()}, "outputs": {}, "levels": list(LEVELS)}
    (folder / RANGES).write_text(json.dumps(ranges))
    port = {**PORT, "dtype": dtype}
    manifest = {"files": {RANGES: {}}, "interface": {"inputs": [port], "outputs": []}}
    return range_warnings(folder, manifest, {"points": np.asarray(values)}, {})


def test_what_validation_data_had_is_no_news(tmp_path: Path) -> None:
    assert warnings(tmp_path, SEEN) == []
    assert warnings(tmp_path, SEEN.astype(np.float64)) == []
    assert warnings(tmp_path, SEEN[:7]) == []
    assert warnings(tmp_path, np.random.default_rng(1).normal(size=(300, 2)) * 0.9) == []


def test_values_outside_are_one_line_with_counts(tmp_path: Path) -> None:
    values = np.zeros((10, 2))
    values[3, 1], values[3, 0], values[6, 0] = 99.0, 50.0, -60.0
    [line] = warnings(tmp_path, values)
    low, high = SEEN[:, 1].min(), SEEN[:, 1].max()
    assert line == (
        "input points: 3 of 20 values, in 2 of 10 samples, are outside of the range of validation "
        f"data; the furthest is 99 of column 1, which had {low:.6g} to {high:.6g}"
    )


def test_too_many_rare_values_are_told(tmp_path: Path) -> None:
    values = np.zeros((100, 2))
    values[:12, 0] = float(np.quantile(SEEN[:, 0], 0.9995))
    [line] = warnings(tmp_path, values)
    assert "input points: 12 of 200 values are beyond the 0.1 % and 99.9 % quantiles" in line
    values[2:, 0] = 0.0
    assert warnings(tmp_path, values) == []


def test_missing_values_are_told_where_there_were_none(tmp_path: Path) -> None:
    values = np.zeros((5, 2))
    values[1] = np.nan
    [line] = warnings(tmp_path, values)
    assert line == "input points: 2 of 10 values are not finite; none was there"


def test_a_bundle_of_an_earlier_version_says_nothing(tmp_path: Path) -> None:
    manifest: Any = {"files": {}, "interface": {"inputs": [PORT], "outputs": []}}
    assert range_warnings(tmp_path, manifest, {"points": np.full((1, 2), 1e9)}, {}) == []


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "not json",
        '{"inputs": {"points": {}}, "outputs": {}}',
        '{"inputs": {"points": {"low": [0, 1, 2], "high": [1], "quantiles": []}}, "outputs": {}}',
        '{"inputs": {"points": {"low": [], "high": [], "quantiles": [[]]}}, "outputs": {}}',
        '{"inputs": {"points": {"low": ["a"], "high": [1], "quantiles": [[1]]}}, "outputs": {}}',
    ],
)
def test_forged_ranges_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / RANGES).write_text(content)
    manifest: Any = {"files": {RANGES: {}}, "interface": {"inputs": [PORT], "outputs": []}}
    with pytest.raises(RefusedBundleError, match=r"^ranges\.json does not describe this model: .+"):
        range_warnings(tmp_path, manifest, {"points": np.zeros((1, 2))}, {})
