"""Points and their classes: an experiment for steps, light checkpoints and ensembles."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

NOTICE = "HOLDFAST_TEST_NOTICE"
"""``<count>``: the process sends itself a SIGTERM in that call of ``score``."""
NUM_STEPS = 13  # of a pass


class Points:
    """Three classes of points in six dimensions; what is drawn of a point is another each time."""

    def __init__(self, split: str) -> None:
        draws = torch.Generator().manual_seed(len(split))
        self._points = torch.randn(100 if split == "train" else 40, 6, generator=draws)
        self._is_train = split == "train"

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        point = self._points[index]
        label = int(point.abs().argmax()) // 2
        noise = random.random() + torch.randn(6) if self._is_train else 0.0
        return point + 0.1 * noise, label


class Classified:
    """Points by their largest coordinate."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "train": {"num_epochs": 6},
        "data": {"batch_size": 8, "evaluation_batch_size": 16},
        "optimizer": {"args": {"lr": 0.01}},
        "selection": {"top_k": 3},
        "ema": {"decays": [0.9]},
    }

    def __init__(self, context: Any) -> None:
        self._num_scored = 0

    def dataset(self, split: str) -> Points:
        return Points(split)

    def model(self) -> nn.Module:
        layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1)]
        return nn.Sequential(*layers, nn.Linear(16, 3))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        self._num_scored += 1
        if str(self._num_scored) == os.environ.get(NOTICE):
            os.kill(os.getpid(), signal.SIGTERM)
        logits = model(batch[0])
        return {
            "loss": cross_entropy(logits, batch[1], reduction="none"),
            "correct": (logits.argmax(1) == batch[1]).float(),
        }

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": float(records["loss"].mean()), "accuracy": float(records["correct"].mean())}
