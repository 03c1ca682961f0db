"""Models that are nearly all weights: hardly anything lies between their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from holdfast.training.experiment.protocol import Batch, Context, Records

NUM_ROWS = 64


class Rows:
    def __init__(self, split: str) -> None:
        number = ["train", "validation", "test"].index(split)
        self.values = torch.randn(NUM_ROWS, 8, generator=torch.Generator().manual_seed(number))

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> Any:
        return self.values[index], int(self.values[index, 0] > 0)


class Light:
    """Its exports take what the libraries take."""

    width = 8

    def __init__(self, context: Context) -> None:
        pass

    def dataset(self, split: str) -> Any:
        return Rows(split)

    def model(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(8, self.width), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Linear(self.width, self.width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.width, 2))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.score(model, batch)["loss"].mean()

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        values, classes = batch
        return {"loss": cross_entropy(model(values), classes, reduction="none")}

    def metrics(self, records: Records) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


class Heavy(Light):
    """67 MB in four layers."""

    width = 2048
