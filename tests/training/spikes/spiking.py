"""Small trainings whose loss spikes, or which hang, at steps that a setting names."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from holdfast import Context, Section, TrainingPlace

STEPS_PER_EPOCH = 12
BATCH_SIZE = 8


class Settings(Section):
    """Which steps, counted from 1, spike or hang whenever they are done."""

    not_finite_at: tuple[int, ...] = ()
    jump_at: tuple[int, ...] = ()
    hangs_at: int | None = None
    hangs_in_dataset: bool = False
    holds_interpreter: bool = False


def hang(*, holds_interpreter: bool) -> None:
    """Never return; no other thread runs meanwhile where the interpreter is held."""
    if holds_interpreter:
        re.match(r"(a+)+$", "a" * 64 + "b")
    time.sleep(3600)


class Spiking:
    """Two classes, with dropout and batch norm, so that draws and buffers matter.

    Each step that is done is noted in a file that CALLS names, so that a test sees which are not.
    """

    Settings = Settings
    defaults: Mapping[str, Any] = {
        "train": {"num_epochs": 4},
        "data": {"batch_size": BATCH_SIZE},
        "optimizer": {"args": {"lr": 0.01}},
        "scheduler": {"name": "CosineAnnealingLR", "args": {"T_max": 60}, "interval": "step"},
        "checkpoint": {"is_auto": False},
    }

    def __init__(self, context: Context) -> None:
        self._settings: Any = context.settings

    def dataset(self, split: str) -> TensorDataset:
        if self._settings.hangs_in_dataset:
            hang(holds_interpreter=False)
        draws = torch.Generator().manual_seed(len(split))
        inputs = torch.randn(STEPS_PER_EPOCH * BATCH_SIZE, 5, generator=draws)
        return TensorDataset(inputs, (inputs.sum(1) > 0).long())

    def model(self) -> nn.Module:
        layers = [nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)]
        return nn.Sequential(*layers, nn.Linear(16, 2))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], at: TrainingPlace) -> Tensor:
        inputs, labels = batch
        step = at.step + 1
        with Path(os.environ["CALLS"]).open("a") as calls:
            calls.write(f"{step}\n")
        if step == self._settings.hangs_at:
            hang(holds_interpreter=self._settings.holds_interpreter)
        loss = cross_entropy(model(inputs), labels)
        if step in self._settings.not_finite_at:
            loss = loss * torch.nan
        return loss * (1000.0 if step in self._settings.jump_at else 1.0)

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        logits = model(inputs)
        return {
            "loss": cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(1) == labels).float(),
        }

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in records.items()}
