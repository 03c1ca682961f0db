"""Which given tensor goes where, and what is said of those that go nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.training.configuration.schema import CheckpointConfig, RunConfig, TrainConfig
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.weights.initial import take_weights

PLACE = Path("given.safetensors")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)


def config(frozen: Any = "kept", **train: Any) -> RunConfig:
    return RunConfig(
        train=TrainConfig.model_validate(train), checkpoint=CheckpointConfig(frozen=frozen)
    )


def given(seed: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Small().state_dict()


def assert_taken(model: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor.to(state[name])) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("before", "table"),
    [
        ("", {}),
        ("module.", {}),
        ("_orig_mod.", {}),
        ("module._orig_mod.", {}),
        ("net.", {"net.": ""}),
        ("module.net.", {"module.net.": ""}),
    ],
)
def test_names_are_mapped(before: str, table: dict[str, str]) -> None:
    weights, model = given(), Small()
    named = {f"{before}{name}": tensor for name, tensor in weights.items()}
    assert take_weights(model, named, config(initial_weights_names=table), PLACE) == ""
    assert_taken(model, weights)


def test_a_compiled_layer_inside_is_mapped() -> None:
    weights, model = given(), Small()
    named = {name.replace("head.", "head._orig_mod."): t for name, t in weights.items()}
    take_weights(model, named, config(), PLACE)
    assert_taken(model, weights)


def test_a_child_that_is_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 1)})
    weights = {"module.weight": torch.ones(1, 2), "module.bias": torch.ones(1)}
    take_weights(model, weights, config(), PLACE)
    assert_taken(model, weights)


def test_the_longest_beginning_counts() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    weights = {f"x.{n}.{k}": torch.full(s, v) for n, v in (("p", 1.0), ("q", 2.0))
               for k, s in (("weight", (1, 1)), ("bias", (1,)))}  # fmt: skip
    table = {"x.": "a.", "x.p.": "a.", "x.q.": "b."}
    take_weights(model, weights, config(initial_weights_names=table), PLACE)
    assert model.state_dict()["b.weight"].item() == 2.0


def test_other_floating_point_types_are_cast_and_ties_stay() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2, bias=False), "two": nn.Linear(2, 2, bias=False)})
    two: Any = model["two"]
    two.weight = model["one"].weight
    weights = {"one.weight": torch.arange(4.0).reshape(2, 2).half()}
    assert take_weights(model, weights, config(), PLACE) == ""
    assert_taken(model, {"two.weight": weights["one.weight"]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("head.bias"), "it lacks head.bias"),
        (lambda w: w.update(tail=torch.ones(1)), "the model has no tail"),
        (
            lambda w: w.update({"head.weight": torch.ones(10, 4)}),
            r"of another shape or kind is head.weight \(float32 \[10, 4\] there, "
            r"float32 \[2, 4\] here\)",
        ),
        (
            lambda w: w.update({"head.bias": torch.ones(2, dtype=torch.int64)}),
            r".*int64 \[2\] there",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_refused_unless_allowed(change: Any, told: str) -> None:
    weights, model = given(), Small()
    change(weights)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=f"does not fit Small: {told}.*should_take_all") as error:
        take_weights(model, weights, config(), PLACE)
    assert "\n" not in str(error.value)
    assert_taken(model, before)
    take_weights(model, weights, config(should_take_all_weights=False), PLACE)
    assert_taken(model, {"body.0.weight": weights["body.0.weight"]})


def test_many_names_are_counted() -> None:
    weights = {f"layer.{i}": torch.ones(1) for i in range(20)}
    with pytest.raises(ConfigError, match=r"layer.4 and 15 more"):
        take_weights(Small(), weights, config(), PLACE)


def test_weights_of_which_nothing_fits_are_refused_in_any_case() -> None:
    with pytest.raises(ConfigError, match=r"does not fit Small"):
        take_weights(Small(), {"x": torch.ones(1)}, config(should_take_all_weights=False), PLACE)


def test_a_table_that_names_nothing_or_joins_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"names 'encoder.', with which no tensor"):
        take_weights(Small(), given(), config(initial_weights_names={"encoder.": ""}), PLACE)
    two = {"x.weight": torch.ones(1), "y.weight": torch.ones(1)}
    table = {"x.": "z.", "y.": "z."}
    with pytest.raises(ConfigError, match=r"x.weight and y.weight .* both become z.weight"):
        take_weights(Small(), two, config(initial_weights_names=table), PLACE)


def test_frozen_parameters_may_be_missing_together_where_they_are_left_out() -> None:
    model, weights = Small(), given()
    for parameter in model.body.parameters():
        parameter.requires_grad_(False)
    frozen = dict(model.body.named_parameters(prefix="body"))
    trained = {name: tensor for name, tensor in weights.items() if name not in frozen}
    take_weights(model, trained, config("left_out"), PLACE)
    with pytest.raises(ConfigError, match=r"it lacks body.0.weight"):
        take_weights(model, trained, config(), PLACE)
    part = {**trained, "body.0.weight": weights["body.0.weight"]}
    with pytest.raises(ConfigError, match=r"it lacks body.0.bias"):
        take_weights(model, part, config("left_out"), PLACE)


def test_a_lazy_layer_is_refused() -> None:
    with pytest.raises(ExperimentError, match=r"has no shape yet"):
        take_weights(nn.Sequential(nn.LazyLinear(2)), {}, config(), PLACE)
