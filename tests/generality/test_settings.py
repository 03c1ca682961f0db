"""Every optimizer and scheduler of torch in its settings, and models of odd kinds: exact."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

from tests.generality.harness import assert_exact

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("ASGD", {"t0": 10}),
    ("Adadelta", {}),
    ("Adafactor", {}),
    ("Adagrad", {"initial_accumulator_value": 0.1, "lr_decay": 0.01}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"fused": True}),
    ("Adam", {"foreach": True}),
    ("AdamW", {"fused": True, "amsgrad": True}),
    ("AdamW", {"maximize": True, "lr": 1e-5}),
    ("Adamax", {}),
    ("NAdam", {"decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Rprop", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", {}),
]
SCHEDULERS: list[tuple[str, dict[str, Any], str]] = [
    ("ConstantLR", {"factor": 0.5, "total_iters": 9}, "step"),
    ("CosineAnnealingLR", {"T_max": 30}, "step"),
    ("CosineAnnealingLR", {"T_max": 4}, "epoch"),
    ("CosineAnnealingWarmRestarts", {"T_0": 7, "T_mult": 2}, "step"),
    ("CyclicLR", {"base_lr": 1e-4, "max_lr": 1e-2, "cycle_momentum": False}, "step"),
    ("CyclicLR", {"base_lr": 1e-4, "max_lr": 1e-2, "mode": "exp_range", "gamma": 0.99}, "step"),
    ("ExponentialLR", {"gamma": 0.9}, "epoch"),
    ("InverseSquareRoot", {"timescale_steps": 10}, "step"),
    ("LinearLR", {"start_factor": 0.1, "total_iters": 20}, "step"),
    ("MultiStepLR", {"milestones": [5, 11, 25]}, "step"),
    ("OneCycleLR", {"max_lr": 0.01, "total_steps": 80}, "step"),
    ("OneCycleLR", {"max_lr": 0.01, "total_steps": 80, "three_phase": True}, "step"),
    ("PolynomialLR", {"total_iters": 60, "power": 2.0}, "step"),
    ("ReduceLROnPlateau", {"patience": 0, "factor": 0.5, "cooldown": 1}, "epoch"),
    ("StepLR", {"step_size": 7}, "step"),
]
MODELS = (
    "weight_norm",
    "spectral_norm",
    "orthogonal",
    "complex64",
    "tied",
    "odd_names",
    "fp64",
    "channels_last",
)


class Complex(nn.Module):
    """[B, 6] through complex weights to [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64) / 3)
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.to(torch.complex64) @ self.weight * self.phase).abs()


class Tied(nn.Module):
    """One matrix in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.outer(self.inner(inputs).relu()))


def odd_model(kind: str) -> nn.Module:
    first = nn.Linear(6, 6)
    if kind == "weight_norm":
        first = parametrizations.weight_norm(first)
    elif kind == "spectral_norm":
        first = parametrizations.spectral_norm(first)
    elif kind == "orthogonal":
        first = parametrizations.orthogonal(first)
    elif kind == "complex64":
        return Complex()
    elif kind == "tied":
        return Tied()
    elif kind == "odd_names":
        layers: dict[str, nn.Module] = {
            "a b": first,
            "ünï": nn.ReLU(),
            "0": nn.BatchNorm1d(6),
            "params": nn.Linear(6, 3),
        }
        return nn.Sequential(OrderedDict(layers))
    elif kind == "channels_last":
        convolution = nn.Conv2d(2, 4, (1, 2)).to(memory_format=torch.channels_last)
        shaped = nn.Unflatten(1, (2, 1, 3))
        return nn.Sequential(shaped, convolution, nn.Flatten(), nn.Linear(8, 3))
    return nn.Sequential(first, nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 3))


class Settings:
    """Three classes of points in six dimensions."""

    defaults: Mapping[str, Any] = {
        "train": {"num_epochs": 12, "clip_norm": 1.0},
        "data": {"batch_size": 16},
        "optimizer": {"args": {"lr": 0.003}},
        "ema": {"decays": [0.9]},
    }
    kind = "plain"
    dtype = torch.float32

    def __init__(self, context: Any) -> None:
        torch.set_default_dtype(self.dtype)

    def dataset(self, split: str) -> list[tuple[Tensor, int]]:
        draws = torch.Generator().manual_seed(len(split))
        points = torch.randn(96, 6, generator=draws)
        return [(point, int(point.abs().argmax()) // 2) for point in points]

    def model(self) -> nn.Module:
        return odd_model(self.kind)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": cross_entropy(model(batch[0]), batch[1], reduction="none")}

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


for _kind in MODELS:
    _dtype = torch.float64 if _kind == "fp64" else torch.float32
    globals()[_kind] = type(_kind, (Settings,), {"kind": _kind, "dtype": _dtype})


def overrides(section: str, name: str, args: dict[str, Any]) -> tuple[str, ...]:
    given = [f"{section}.args.{key}={json.dumps(value)}" for key, value in args.items()]
    return (f"{section}.name={name}", *given)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "args"), OPTIMIZERS, ids=[f"{n}-{a}" for n, a in OPTIMIZERS])
def test_an_optimizer_is_exact(tmp_path: Path, name: str, args: dict[str, Any]) -> None:
    asked = {"lr": 0.003, **args}
    assert_exact(f"{__file__}:Settings", tmp_path, overrides("optimizer", name, asked))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args", "interval"), SCHEDULERS, ids=[f"{n}-{a}" for n, a, _ in SCHEDULERS]
)
def test_a_scheduler_is_exact(
    tmp_path: Path, name: str, args: dict[str, Any], interval: str
) -> None:
    asked = (*overrides("scheduler", name, args), f"scheduler.interval={interval}")
    # Those that move momentum, too, need an optimizer that has some.
    momentum = overrides("optimizer", "SGD", {"lr": 0.003, "momentum": 0.9})
    assert_exact(f"{__file__}:Settings", tmp_path, (*asked, *momentum, "warmup.num_steps=4"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_an_odd_kind_is_exact(tmp_path: Path, kind: str) -> None:
    assert_exact(f"{__file__}:{kind}", tmp_path)
