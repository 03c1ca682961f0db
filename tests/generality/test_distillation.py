"""Distillation from a frozen teacher that the experiment keeps, drawn from the run's seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.faults.campaign import Training
from tests.generality.harness import QUICK_EXPORT, assert_exact, assert_published

pytestmark = pytest.mark.slow


class Distill:
    defaults: Mapping[str, Any] = {
        "train": {"num_epochs": 12},
        "data": {"batch_size": 16},
        "optimizer": {"args": {"lr": 0.01}},
    }

    def __init__(self, context: Any) -> None:
        self._teacher = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).eval()

    def dataset(self, split: str) -> list[tuple[Tensor, Tensor]]:
        draws = torch.Generator().manual_seed(len(split))
        return [(torch.randn(6, generator=draws), torch.zeros(0)) for _ in range(96)]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 3))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._errors(model, batch[0]).mean()

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": self._errors(model, batch[0])}

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}

    def _errors(self, model: nn.Module, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._teacher(inputs)
        return mse_loss(model(inputs), wanted, reduction="none").mean(1)


def test_a_student_of_a_frozen_teacher_is_exact_to_its_bundle(tmp_path: Path) -> None:
    experiment = f"{__file__}:Distill"
    assert_exact(experiment, tmp_path)
    calm = Training(tmp_path / "calm", "one", experiment, QUICK_EXPORT)
    assert (assert_published(calm).bundle / "manifest.json").is_file()
