"""Nests keep the kinds of their containers, whatever is done with their leaves."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from holdfast.training.experiment.nests import children, default_collated, leaves, mapped


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    value: Any
    more: Any = None


@dataclass
class Derived:
    value: Any
    made: Any = field(init=False, default=7)


class Stubborn(dict[str, Any]):
    """A dict that is made in its own way."""

    def __init__(self, one: Any, *, other: Any) -> None:
        super().__init__(one=one, other=other)
        self.note = "kept"


NESTS = [
    1,
    (1, 2),
    [1, (2, 3)],
    Pair(1, [2]),
    {"a": 1, "b": {"c": (2,)}},
    OrderedDict(b=1, a=2),
    defaultdict(list, a=1),
    UserDict(a=1),
    Frozen(1, Pair(2, 3)),
    Derived(1),
    Stubborn(1, other=[2]),
    torch.Size([2, 3]),
]


@pytest.mark.parametrize("nest", NESTS, ids=lambda nest: type(nest).__name__)
def test_a_nest_is_mapped_into_one_of_its_kind(nest: Any) -> None:
    assert mapped(lambda leaf: leaf, nest) == nest
    changed = mapped(lambda leaf: leaf + 1, nest)
    assert type(changed) is type(nest)
    assert [leaf for _, leaf in leaves(changed)] == [leaf + 1 for _, leaf in leaves(nest)]
    if isinstance(changed, Stubborn):
        assert changed.note == "kept"


def test_what_cannot_be_written_to_becomes_a_dict() -> None:
    assert mapped(lambda leaf: leaf + 1, MappingProxyType({"a": 1})) == {"a": 2}


def test_leaves_are_found_by_their_path() -> None:
    nest = {"a": (1, Pair(2, 3)), "b": Frozen("text", None)}
    assert list(leaves(nest)) == [
        (("a", 0), 1),
        (("a", 1, "left"), 2),
        (("a", 1, "right"), 3),
        (("b", "value"), "text"),
        (("b", "more"), None),
    ]
    assert children("text") is None
    assert children(Frozen) is None  # a class, not an instance


def test_dataclasses_are_collated_where_torch_knows_none() -> None:
    items = [(Frozen(float(i), Pair(i, Frozen(torch.ones(2) * i))), {"n": i}) for i in range(3)]
    first, second = default_collated(items)
    assert isinstance(first, Frozen)
    assert first.value.tolist() == [0, 1, 2]
    assert first.value.dtype == torch.float64  # as torch has it for numbers
    assert isinstance(first.more, Pair)
    assert first.more.right.value.shape == (3, 2)
    assert first.more.right.more is None
    assert second["n"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("item", [(torch.ones(2), 1), {"a": torch.ones(2), "b": "text"}, 3.0])
def test_all_else_is_collated_as_torch_does_it(item: Any) -> None:
    wanted: Any = torch.utils.data.default_collate([item, item])
    found: Any = default_collated([item, item])
    assert type(found) is type(wanted)
    for (path, mine), (_, its) in zip(leaves(found), leaves(wanted), strict=True):
        assert torch.equal(mine, its) if isinstance(mine, Tensor) else mine == its, path


def test_a_field_that_only_some_items_have_is_refused() -> None:
    with pytest.raises(TypeError):
        default_collated([Frozen(None), Frozen(1)])
