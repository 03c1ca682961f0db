"""Data of small trainings: points, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


class OnPoints:
    """The parts of an experiment that these trainings share: six numbers, and two classes."""

    defaults: ClassVar[dict[str, Any]] = {
        "train": {"num_epochs": 12},
        "data": {"batch_size": 16},
        "ema": {"decays": [0.9]},
        "selection": {"num_bootstrap": 100},
    }

    def __init__(self, context: Any) -> None:
        pass

    def dataset(self, split: str) -> TensorDataset:
        draws = torch.Generator().manual_seed(len(split))
        points = torch.randn(96, 6, generator=draws)
        return TensorDataset(points, (points[:, 0] * points[:, 1] > 0).long())

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


def classification_rows(logits: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Records of a classifier."""
    return {"loss": torch.nn.functional.cross_entropy(logits, classes, reduction="none")}
