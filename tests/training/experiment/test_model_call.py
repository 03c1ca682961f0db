"""Inputs by position, by keyword, or as one dict: what is flat becomes what the model takes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from holdfast.training.errors import ExperimentError
from holdfast.training.experiment.model_call import CallForm, call_form
from holdfast.training.experiment.protocol import (
    collate,
    input_names,
    inputs_of,
    model_inputs,
    require_map_style,
    require_pair,
)


class OneDict(nn.Module):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["a"] - inputs["b"]


class Keywords(nn.Module):
    def forward(self, b: Tensor, a: Tensor, mask: Tensor | None = None) -> Tensor:
        return a - b if mask is None else (a - b) * mask


class Positions(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


class Pairs:
    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.inputs, 0

    def dataset(self, split: str) -> Pairs:
        return self


A, B = torch.tensor([5.0]), torch.tensor([3.0])


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (OneDict(), {"a": A, "b": B}),
        (OneDict(), OrderedDict(b=B, a=A)),
        (Keywords(), {"a": A, "b": B}),
        (Keywords(), {"mask": torch.ones(1), "a": A, "b": B}),
        (Positions(), (A, B)),
    ],
)
def test_flat_inputs_reach_the_model_as_it_takes_them(model: nn.Module, inputs: Any) -> None:
    experiment: Any = Pairs(inputs)
    form = call_form(experiment, model)
    flat = model_inputs(collate(experiment, [experiment[0]]))
    assert form.call(model, flat).tolist() == [[2.0]]


@pytest.mark.parametrize(
    ("args", "kwargs"), [(({"b": B, "a": A},), {}), ((), {"b": B, "a": A}), ((A,), {"b": B})]
)
def test_a_call_is_made_flat_however_the_score_calls(args: Any, kwargs: Any) -> None:
    assert CallForm(("a", "b"), True).flat(args, kwargs) == (A, B)


def test_a_score_that_leaves_an_input_out_is_told() -> None:
    with pytest.raises(ExperimentError, match="without the input b, which batches have"):
        CallForm(("a", "b")).flat(({"a": A},), {})


class Encoded(NamedTuple):
    ids: Any
    mask: Any
    label: Any


class Target(NamedTuple):
    label: Any
    weight: Any


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ((A, 1), tuple),
        ([A, 1], tuple),
        ((A,), tuple),
        ({"x": A}, dict),
        (A, Tensor),
        (1, Tensor),
        (Target(A, 1), Target),
    ],
)
def test_a_batch_keeps_the_kind_of_its_items(item: Any, kind: type) -> None:
    batch: Any = collate(Pairs(None), [item, item])
    assert isinstance(batch, kind)
    assert isinstance(batch, Tensor) or len(batch) == len(item)


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        ((A, B), (A,)),
        (((A, B), 0), (A, B)),
        (({"a": A, "b": B}, 0), (A, B)),
        ((A,), (A,)),
        (A, (A,)),
        ((A, B, A), (A,)),
    ],
)
def test_the_inputs_of_a_batch(batch: Any, inputs: tuple[Tensor, ...]) -> None:
    assert model_inputs(batch) == inputs


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"x": A, "label": B}, r"a pair \(inputs, targets\); found a dict with the keys x, label"),
        ("text", "found a str"),
        ((), "found a tuple"),
        ((["text"], 0), "found a list of str"),
        (({"a": {"b": A}}, 0), "found a dict of dict"),
    ],
)
def test_what_has_no_inputs_is_told_in_one_line(batch: Any, told: str) -> None:
    with pytest.raises(ExperimentError, match=told):
        model_inputs(batch)


@dataclass
class Example:
    ids: Any
    label: Any
    mask: Any = None


@pytest.mark.parametrize(
    "batch",
    [
        {"ids": A, "label": B, "mask": None},
        Example(A, B),
        Encoded(A, None, B),
        ({"ids": A, "mask": None, "more": B}, B),
        (Example(A, B), B),
    ],
)
def test_inputs_are_those_that_are_named(batch: Any) -> None:
    assert inputs_of(batch, ("ids", "mask")) == {"ids": A}
    assert model_inputs(batch, ("ids",)) == (A,)


@pytest.mark.parametrize("batch", [A, (A, B), {"id": A}, Example(A, B), ({"id": A}, B), ()])
def test_a_batch_without_what_is_named_is_told(batch: Any) -> None:
    told = "input_names names ids, text; a batch must be"
    with pytest.raises(ExperimentError, match=told) as e:
        inputs_of(batch, ("ids", "text"))
    assert "\n" not in str(e.value)


class Named(Pairs):
    """Batches are dicts, whose inputs are named."""

    def __init__(self, *names: str, **entries: Any) -> None:
        self.input_names, self.entries = names, entries

    def __getitem__(self, index: int) -> Any:
        return self.entries


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs["a"] - kwargs["b"]


@pytest.mark.parametrize("model", [Keywords(), Positions(), Anything()])
def test_what_is_named_comes_by_keyword(model: nn.Module) -> None:
    experiment: Any = Named("a", "b", b=B, label=1, a=A)
    form = call_form(experiment, model)
    assert form.call(model, (A, B)).tolist() == [2.0]
    assert form.flat((), {"b": B, "labels": A, "a": A}) == (A, B)


def test_a_call_by_position_follows_the_arguments_of_forward() -> None:
    experiment: Any = Named("a", "b", a=A, b=B)
    assert call_form(experiment, Keywords()).flat((B, A), {}) == (A, B)


def test_names_that_forward_does_not_take_are_told() -> None:
    experiment: Any = Named("a", "c", a=A, c=B)
    with pytest.raises(ExperimentError, match=r"names c, and forward\(\) of Positions"):
        call_form(experiment, Positions())


@pytest.mark.parametrize("names", ["ids", [1], {"ids"}])
def test_names_that_are_none_are_told(names: Any) -> None:
    experiment: Any = Named(a=A)
    experiment.input_names = names
    with pytest.raises(ExperimentError, match="input_names of Named must be a tuple of names"):
        input_names(experiment)


def test_a_dict_is_refused_where_it_is_a_whole_batch() -> None:
    with pytest.raises(ExperimentError, match="must be a pair"):
        require_pair({"x": A})


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        (Stream(), "Stream is a stream"),
        (iter([1]), "lacks __len__ and __getitem__"),
        ({1, 2}, "lacks __getitem__"),
    ],
)
def test_what_has_no_items_by_index_is_told(dataset: object, told: str) -> None:
    with pytest.raises(ExperimentError, match=told):
        require_map_style(dataset, "train")
