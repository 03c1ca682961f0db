"""What a bundle's own program makes of sizes that may vary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from holdfast.training.bundles import consumer
from holdfast.training.bundles.model_card import _about_inputs
from holdfast.training.bundles.promotion import _number, _port_text

IDS = {"name": "ids", "dtype": "int64", "shape": ["length"]}
MASK = {"name": "mask", "dtype": "int64", "shape": ["length"]}
STEPS = {"name": "steps", "dtype": "float32", "shape": ["length", 3]}
FIXED = {"name": "fixed", "dtype": "float32", "shape": [2]}
PLANE = {"name": "plane", "dtype": "float32", "shape": ["height", "width"]}


@pytest.mark.parametrize(
    ("ports", "num_columns", "shapes"),
    [
        ([IDS], 7, [(7,)]),
        ([IDS, MASK], 8, [(4,), (4,)]),
        ([STEPS, FIXED], 14, [(4, 3), (2,)]),
        ([IDS, STEPS, FIXED], 6, [(1,), (1, 3), (2,)]),
        ([FIXED], 2, [(2,)]),
    ],
)
def test_the_size_follows_from_the_columns_of_a_table(
    ports: Any, num_columns: int, shapes: Any
) -> None:
    table = np.arange(2.0 * num_columns).reshape(2, num_columns)
    arrays = consumer._split_columns(table, ports)
    assert [arrays[port["name"]].shape[1:] for port in ports] == shapes
    flat = [array.reshape(2, -1) for array in arrays.values()]
    assert np.array_equal(np.concatenate(flat, axis=1), table)


@pytest.mark.parametrize(
    ("ports", "num_columns", "told"),
    [
        ([IDS, MASK], 7, "found 7 columns, the model takes a multiple of 2"),
        ([STEPS, FIXED], 2, "takes 2 and a multiple of 3"),
        ([STEPS, FIXED], 1, "takes 2 and a multiple of 3"),
        ([PLANE], 12, "the sizes height, width vary, and a row of CSV is flat: take JSON"),
    ],
)
def test_a_table_that_does_not_fit_is_told(ports: Any, num_columns: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        consumer._split_columns(np.zeros((2, num_columns)), ports)


@pytest.mark.parametrize(
    ("shape", "is_good"),
    [
        (["length"], True),
        ([3, "n_1"], True),
        ([0], True),
        (["a b"], False),
        ([""], False),
        (["\x1b[2J"], False),
        ([-1], False),
        ([None], False),
        ([["length"]], False),
        (["x" * 300], False),
    ],
)
def test_a_size_of_a_manifest_is_a_number_or_a_name(shape: Any, is_good: bool) -> None:
    ports = {"inputs": [{**IDS, "shape": shape}], "outputs": []}
    graph = {"formats": {}, "interface": ports}
    if is_good:
        consumer._check_graph(graph, {})
    else:
        with pytest.raises(ValueError, match="is no input or output"):
            consumer._check_graph(graph, {})


def test_a_name_stands_for_one_size_in_a_call() -> None:
    sizes: dict[str, int] = {}
    assert consumer._fits((4, 3), STEPS["shape"], sizes)
    assert consumer._fits((4,), MASK["shape"], sizes)
    assert not consumer._fits((5,), MASK["shape"], sizes)
    assert not consumer._fits((0,), MASK["shape"], {})
    assert not consumer._fits((4, 2), STEPS["shape"], {})
    assert not consumer._fits((4,), STEPS["shape"], {})


def test_people_are_told_which_sizes_may_vary() -> None:
    assert "A size with a name may be any" in _about_inputs([STEPS])
    assert "name" not in _about_inputs([FIXED])
    assert _port_text("float32", [None, _number("length"), 3]) == "float32 [samples, any, 3]"
