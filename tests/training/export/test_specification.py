"""Names, shapes and what an experiment may leave out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from holdfast.training.errors import ExportError
from holdfast.training.experiment.nests import leaves
from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.specification import ExportSpec, derive_interface, export_spec


class Returning(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self._function = function

    def forward(self, images: Tensor) -> Any:
        return self._function(images)


class Pair(NamedTuple):
    rul: Any
    health: Any


EXAMPLES = (torch.rand(3, 4),)


@pytest.mark.parametrize(
    ("function", "names", "shapes"),
    [
        (lambda x: x, ("output",), [(4,)]),
        (lambda x: x[:, 0], ("output",), [(1,)]),
        (lambda x: (x, x[:, :2]), ("output_0", "output_1"), [(4,), (2,)]),
        (lambda x: Pair(x[:, 0], x), ("rul", "health"), [(1,), (4,)]),
        (lambda x: {"a": x, "b": x[:, 0]}, ("a", "b"), [(4,), (1,)]),
    ],
)
def test_names_and_shapes_follow_from_what_the_model_returns(
    function: Any, names: tuple[str, ...], shapes: list[tuple[int, ...]]
) -> None:
    model = Returning(function)
    interface = derive_interface(model, EXAMPLES, ExportSpec())
    assert [port.name for port in interface.inputs] == ["images"]
    assert tuple(port.name for port in interface.outputs) == names
    assert [port.shape for port in interface.outputs] == shapes


@dataclass
class Told:
    logits: Tensor
    loss: Tensor | None = None
    aside: Any = None


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: {"a": (x, None, [x]), "b": None, "c": x}, ("a_0", "a_2_0", "c")),
        (lambda x: Told(x, aside=Pair(x, None)), ("logits", "aside_rul")),
        (lambda x: (x, (x, x)), ("output_0", "output_1_0", "output_1_1")),
    ],
)
def test_outputs_are_named_by_the_way_to_them(function: Any, names: tuple[str, ...]) -> None:
    interface = derive_interface(Returning(function), EXAMPLES, ExportSpec())
    assert tuple(port.name for port in interface.outputs) == names


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,
        lambda x: x[:, 0],
        lambda x: (x, x[:, 0]),
        lambda x: {"a": x, "b": x[:, 0]},
        lambda x: {"a": (x, None, [x[:, 0]]), "b": None},
        lambda x: Told(x, aside=Pair(x, None)),
        lambda x: Pair(Told(x), {"deep": x}),
    ],
)
def test_flat_outputs_become_what_the_model_returned(function: Any) -> None:
    model = Returning(function)
    interface = derive_interface(model, EXAMPLES, ExportSpec())
    rebuilt = interface.structure.rebuild(list(GuardedModel(model)(*EXAMPLES)))
    wanted = model(*EXAMPLES)
    assert type(rebuilt) is type(wanted)
    for (path, mine), (_, its) in zip(leaves(rebuilt), leaves(wanted), strict=True):
        assert torch.equal(mine, its) if isinstance(its, Tensor) else mine is its, path


@pytest.mark.parametrize(
    ("function", "spec", "message"),
    [
        (lambda x: x.mean(), ExportSpec(), "must count samples"),
        (lambda _: "text", ExportSpec(), "the model returns a str"),
        (lambda _: [], ExportSpec(), "the model returns a list"),
        (lambda x: {"a": (x, 3)}, ExportSpec(), "returns an int as a.1; an exported model"),
        (lambda x: x, ExportSpec(input_names=("a", "b")), "one for each of 1 inputs"),
        (lambda x: x, ExportSpec(input_names=("output",)), "must be distinct"),
        (lambda x: x, ExportSpec(class_names={"output": ("a",)}), "1 names for 'output'"),
        (lambda x: (x, x), ExportSpec(output_names=("a",)), "returns 2 outputs"),
    ],
)
def test_what_does_not_fit_is_refused(function: Any, spec: ExportSpec, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        derive_interface(Returning(function), EXAMPLES, spec)


def test_an_experiment_must_return_the_right_kind() -> None:
    class Wrong:
        def export_spec(self) -> dict[str, str]:
            return {}

    experiment: Any = Wrong()
    with pytest.raises(ExportError, match=r"export_spec\(\) of Wrong returned a dict"):
        export_spec(experiment)


def test_integer_and_bool_outputs_mark_a_spoiled_sample() -> None:
    model = GuardedModel(Returning(lambda x: (x.argmax(1), x > 0.5, x)))
    inputs = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
    index, is_large, values = model(inputs)
    assert index.tolist() == [[1], [-1]]
    assert is_large.tolist() == [[True, True], [False, False]]
    assert values[1].isnan().all()
