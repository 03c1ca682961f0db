"""Optimizers go on from their restored state with the same bits, whatever it is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.training.checkpointing.json_state import Tensors
from holdfast.training.checkpointing.model_weights import unusual_strides
from holdfast.training.configuration.schema import OptimizerConfig
from holdfast.training.errors import CheckpointMismatchError, UnsupportedStateError
from holdfast.training.optimizers.building import CONFIGURED, build_optimizer
from holdfast.training.optimizers.optimizer_state import (
    CapturedOptimizer,
    capture_optimizer,
    capture_optimizers,
    join_optimizer,
    restore_optimizer,
    restore_optimizers,
)

Build = Callable[[], nn.Module]


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def channels_last() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 5, 3), nn.Flatten(1))
    return model.to(memory_format=torch.channels_last)


def channels_last_3d() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 4, 3), nn.Flatten()).to(memory_format=torch.channels_last_3d)


class Transposed(nn.Module):
    """A weight that lies as its transpose, as after ``nn.Parameter(weight.t())``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 9).t())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def double() -> nn.Module:
    return small_model().double()


def bfloat16() -> nn.Module:
    return small_model().bfloat16()


INPUTS: dict[Build, tuple[int, ...]] = {
    channels_last: (2, 3, 9, 9),
    channels_last_3d: (2, 3, 5, 5, 5),
    Transposed: (3, 9),
}


def optimizer_of(model: nn.Module, name: str = "AdamW", **args: Any) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig(name=name, args={"lr": 0.1, **args}), model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, build: Build, num_steps: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(num_steps):
        torch.manual_seed(step)
        inputs = torch.randn(INPUTS.get(build, (5, 3))).to(dtype)
        optimizer.zero_grad()
        model(inputs).float().square().mean().backward()
        optimizer.step()


def as_read(captured: CapturedOptimizer) -> CapturedOptimizer:
    """As it comes from a file: contiguous, and a copy."""
    tensors: Tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in captured.tensors.items()
    }
    return replace(captured, tensors=tensors, usual_strides={})


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("Adam", {"amsgrad": True}),
    ("SGD", {"momentum": 0.9}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adagrad", {}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("Adamax", {}),
    ("Adadelta", {}),
    ("ASGD", {}),
    ("Rprop", {}),
    ("Adafactor", {}),
    ("AdamW", {"fused": True}),
    ("SGD", {"momentum": 0.9, "fused": True}),
    ("Adagrad", {"fused": True}),
]


@pytest.mark.parametrize(
    "build", [small_model, channels_last, channels_last_3d, Transposed, double, bfloat16]
)
@pytest.mark.parametrize(("name", "args"), SETTINGS)
def test_a_restored_optimizer_goes_on_with_the_same_bits(
    name: str, args: dict[str, Any], build: Build
) -> None:
    model = build()
    optimizer = optimizer_of(model, name, **args)
    train(model, optimizer, build, 3)
    captured = capture_optimizer(optimizer, model)
    other = build()
    other.load_state_dict(model.state_dict())
    other_optimizer = optimizer_of(other, name, **args)
    restore_optimizer(
        other_optimizer,
        other,
        as_read(captured),
        unusual_strides(captured.tensors, captured.usual_strides),
    )
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[one].items():
            if isinstance(value, Tensor):
                found = other_optimizer.state[two][key]
                assert (found.dtype, found.device) == (value.dtype, value.device), key
                assert found.stride() == value.stride() or value.numel() <= 1, key
    train(model, optimizer, build, 4)
    train(other, other_optimizer, build, 4)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_lies_as_its_parameter_is_not_noted() -> None:
    model = channels_last()
    optimizer = optimizer_of(model)
    train(model, optimizer, channels_last, 1)
    captured = capture_optimizer(optimizer, model)
    assert unusual_strides(captured.tensors, captured.usual_strides) == {}


def test_the_product_of_momenta_keeps_its_own_type_beside_double_weights() -> None:
    model = double()
    optimizer = optimizer_of(model, "NAdam")
    train(model, optimizer, double, 2)
    other = copy.deepcopy(model)
    other_optimizer = optimizer_of(other, "NAdam")
    restore_optimizer(other_optimizer, other, as_read(capture_optimizer(optimizer, model)))
    assert {state["mu_product"].dtype for state in other_optimizer.state.values()} == {
        torch.float32
    }


def test_optimizer_state_is_keyed_by_parameter_name() -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    train(model, optimizer, small_model, 1)
    captured = capture_optimizer(optimizer, model)
    assert {"0.weight/exp_avg", "0.weight/step", "2.bias/exp_avg_sq"} <= captured.tensors.keys()


def test_the_state_of_another_model_is_refused() -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    train(model, optimizer, small_model, 1)
    captured = capture_optimizer(optimizer, model)
    other = nn.Linear(3, 4)
    with pytest.raises(CheckpointMismatchError, match=r"0\.weight"):
        restore_optimizer(optimizer_of(other), other, captured)


def test_the_state_of_another_optimizer_is_refused_in_words() -> None:
    model = small_model()
    captured = capture_optimizer(optimizer_of(model, "SGD"), model)
    with pytest.raises(CheckpointMismatchError, match=r"of another optimizer than AdamW: .*betas"):
        restore_optimizer(optimizer_of(model, "AdamW"), model, captured)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "RMSprop"])
def test_a_layer_that_joined_joins_again(name: str) -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small_model()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model, optimizer_of(model, name)

    model, optimizer = begun()
    train(model, optimizer, small_model, 2)
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(True)
        join_optimizer(optimizer, parameter)
    train(model, optimizer, small_model, 2)
    captured = as_read(capture_optimizer(optimizer, model))
    other, other_optimizer = begun()
    other.load_state_dict(model.state_dict())
    other[0].requires_grad_(True)  # type: ignore[index]
    restore_optimizer(other_optimizer, other, captured)
    train(model, optimizer, small_model, 3)
    train(other, other_optimizer, small_model, 3)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_optimizer_of_a_layer_that_is_gone_is_not_saved() -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    model[2] = nn.Linear(4, 2)  # type: ignore[index]
    with pytest.raises(UnsupportedStateError, match="a parameter that Sequential no longer has"):
        capture_optimizer(optimizer, model)


def named_optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    return {
        "lbfgs": torch.optim.LBFGS(model.parameters(), max_iter=3, history_size=3),
        "adam": torch.optim.Adam(model.parameters(), lr=0.01),
    }


def test_several_optimizers_go_on_with_the_same_bits_and_lbfgs_with_its_history() -> None:
    inputs = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))

    def advance(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], num: int) -> None:
        def closure() -> Tensor:
            model.zero_grad()
            loss: Tensor = (model(inputs) - inputs[:, :2]).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for _ in range(num):
            for optimizer in optimizers.values():
                optimizer.step(closure)  # type: ignore[arg-type]

    model = small_model()
    optimizers = named_optimizers(model)
    advance(model, optimizers, 3)
    captured = capture_optimizers(optimizers, model)
    assert {"lbfgs/0.weight/old_dirs/0", "adam/0.weight/exp_avg"} <= captured.tensors.keys()
    other = small_model()
    other.load_state_dict(model.state_dict())
    others = named_optimizers(other)
    restore_optimizers(
        others,
        other,
        as_read(captured),
        unusual_strides(captured.tensors, captured.usual_strides),
    )
    advance(model, optimizers, 4)
    advance(other, others, 4)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_state_of_other_optimizers_is_refused() -> None:
    model = small_model()
    captured = capture_optimizers(named_optimizers(model), model)
    alone = {CONFIGURED: optimizer_of(model)}
    told = "has the optimizers lbfgs, adam, this experiment the configured one"
    with pytest.raises(CheckpointMismatchError, match=told):
        restore_optimizers(alone, model, captured)
    with pytest.raises(CheckpointMismatchError, match="this experiment lbfgs, adam: use the code"):
        restore_optimizers(named_optimizers(model), model, capture_optimizers(alone, model))


class KeepsElsewhere(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "num_calls": 3}


class KeepsByName(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.state["calls"] = 3  # type: ignore[index]


@pytest.mark.parametrize(("kind", "key"), [(KeepsElsewhere, "num_calls"), (KeepsByName, "calls")])
def test_state_that_no_parameter_has_is_refused(kind: Any, key: str) -> None:
    model = small_model()
    told = rf"{kind.__name__} keeps '{key}', .* keep it in state\[parameter\]"
    with pytest.raises(UnsupportedStateError, match=told):
        capture_optimizer(kind(model.parameters(), lr=0.1), model)
