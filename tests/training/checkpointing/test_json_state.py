from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.checkpointing.json_state import Tensors, decode, encode
from holdfast.training.errors import CheckpointCorruptError, UnsupportedStateError

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
keys = st.text() | st.integers()
nests = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


def round_trip(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    encoded = encode(value, "root", tensors, keeps_order=True)
    text = json.dumps(encoded, allow_nan=False, sort_keys=True)  # as files are written
    return decode(json.loads(text), tensors)


@given(nests)
def test_any_nest_comes_back_as_it_was(value: Any) -> None:
    again = round_trip(value)
    assert again == value
    assert repr(again) == repr(value)


def test_order_is_kept_where_it_is_asked_for_alone() -> None:
    assert list(round_trip({"b": 1, "a": {"d": 2, "c": 3}})["a"]) == ["d", "c"]
    assert encode({"b": 1, "a": 2}, "scheduler", {}) == {"b": 1, "a": 2}


def test_nan_and_infinity_come_back() -> None:
    again = round_trip({"a": math.nan, "b": -math.inf})
    assert math.isnan(again["a"])
    assert again["b"] == -math.inf


def test_a_counter_with_integer_keys_comes_back_as_a_dict() -> None:
    assert round_trip({"milestones": Counter([3, 5])}) == {"milestones": {3: 1, 5: 1}}


def test_tensors_go_to_their_own_table_under_their_path() -> None:
    tensors: dict[str, torch.Tensor] = {}
    encoded = encode({"a": [torch.ones(2)]}, "scheduler", tensors)
    assert list(tensors) == ["scheduler/a/0"]
    assert torch.equal(decode(encoded, tensors)["a"][0], torch.ones(2))


@pytest.mark.parametrize("value", [{1, 2}, object(), lambda: None, 3j])
def test_what_is_neither_json_nor_tensor_is_refused_with_its_path(value: Any) -> None:
    with pytest.raises(UnsupportedStateError, match="experiment/outer/0"):
        encode({"outer": [value]}, "experiment", {})


def test_a_reference_to_a_missing_tensor_is_corrupt() -> None:
    with pytest.raises(CheckpointCorruptError, match="gone"):
        decode({"$tensor": "gone"}, {})


@pytest.mark.parametrize(
    "value",
    [
        {b"even": 15, b"odd": 17},
        {1: torch.ones(2), "1": torch.zeros(3)},
        {"a/b": torch.ones(2), "a": {"b": torch.zeros(3)}},
        {(b"x", 1): b"one", (b"y", 1): b"two"},
        {True: torch.ones(1), "True": torch.zeros(1), 1.5: torch.ones(2), "1.5": torch.zeros(2)},
        [{"0": b"zero"}, {0: b"other"}],
        {"0/0": b"slash", "0": [b"list"]},
        {"x": torch.ones(1), "x~2": torch.ones(2), "y": {b"a": 1, b"b": 2, b"c": 3}},
    ],
)
def test_no_tensor_overwrites_another_whatever_the_keys_are(value: Any) -> None:
    assert repr(round_trip(value)) == repr(value)


def test_keys_that_collide_with_nothing_keep_their_paths() -> None:
    tensors: Tensors = {}
    encode({"a": {1: torch.ones(1)}, b"k": torch.ones(1)}, "p", tensors)
    assert sorted(tensors) == ["p/a/1", "p/b'k'", "p/key"]
