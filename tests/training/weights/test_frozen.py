"""What is noticed of frozen parameters that are left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from holdfast.training.configuration.schema import CheckpointConfig
from holdfast.training.errors import CheckpointMismatchError, ExperimentError
from holdfast.training.weights.frozen import FrozenParameters, load_saved

LEFT_OUT = CheckpointConfig(frozen="left_out")
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    model[0].requires_grad_(False)
    return model


def put(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("0.bias")[1] += 1


def replace_data(model: nn.Module) -> None:
    bias = model.get_parameter("0.bias")
    bias.data = bias.data.clone()


def unfreeze(model: nn.Module) -> None:
    model.get_parameter("0.bias").requires_grad_(True)


def write_past(model: nn.Module) -> None:
    model.get_parameter("0.bias").data[1] += 1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("change", [put, replace_data, unfreeze])
def test_a_change_is_noticed_after_the_step(
    change: Callable[[nn.Module], None], dtype: torch.dtype
) -> None:
    model = network(dtype)
    frozen = FrozenParameters(model)
    frozen.watch(6)
    frozen.require_same_bits(6)
    change(model)
    with pytest.raises(ExperimentError, match=r"0\.bias .* in step 7") as error:
        frozen.watch(7)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_written_past_the_counter_is_noticed_by_its_bits(dtype: torch.dtype) -> None:
    model = network(dtype)
    frozen = FrozenParameters(model)
    write_past(model)
    frozen.watch(7)
    with pytest.raises(ExperimentError, match=r"0\.bias .* changed before step 8 ended"):
        frozen.require_same_bits(8)


def test_what_is_trained_may_change() -> None:
    model = network()
    frozen = FrozenParameters(model)
    with torch.no_grad():
        model.get_parameter("1.bias").add_(1)
    frozen.require_same_bits(7)
    assert frozen.names == {"0.weight", "0.bias"}
    assert frozen.others(model.state_dict()).keys() == {"1.weight", "1.bias"}


def test_all_names_of_a_tied_parameter_are_left_out() -> None:
    model = network()
    model.add_module("again", model[0])
    assert FrozenParameters(model).names == {"0.weight", "0.bias", "again.weight", "again.bias"}


@pytest.mark.parametrize(
    "change",
    [
        write_past,
        lambda model: model.to(torch.float64),
        lambda model: model[0].weight.data.copy_(model[0].weight.flip(0)),
    ],
)
def test_the_digest_is_of_types_places_and_bytes(change: Callable[[nn.Module], object]) -> None:
    digest = FrozenParameters(network()).digest
    assert FrozenParameters(network()).digest == digest
    other = network()
    change(other)
    here = FrozenParameters(other)
    here.require(None)
    here.require(here.digest)
    with pytest.raises(CheckpointMismatchError, match="are not those that were trained on"):
        here.require(digest)


def test_saved_weights_are_loaded_beside_the_base() -> None:
    saved = FrozenParameters(network()).others(network().state_dict())
    saved["1.bias"] = torch.tensor([5.0, 6.0])
    model = network()
    load_saved(model, saved, LEFT_OUT, None)
    assert torch.equal(model.get_parameter("1.bias"), saved["1.bias"])
    assert FrozenParameters(model).digest == FrozenParameters(network()).digest
    with pytest.raises(CheckpointMismatchError, match=r"0\.weight is absent there"):
        load_saved(network(), saved, CheckpointConfig(), None)
    del saved["1.weight"]
    with pytest.raises(CheckpointMismatchError, match=r"configured: 1\.weight is absent there"):
        load_saved(network(), saved, LEFT_OUT, None)
    with pytest.raises(CheckpointMismatchError, match=r"tail is \[1\] there, absent here"):
        load_saved(network(), {**network().state_dict(), "tail": torch.ones(1)}, LEFT_OUT, None)


def test_where_nothing_is_frozen_nothing_can_be_left_out() -> None:
    with pytest.raises(ExperimentError, match="has no frozen parameter"):
        FrozenParameters(nn.Linear(1, 1))
