"""A training whose steps take a given time, so that a busy machine replays as a quiet one does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from holdfast import Context, Section


class Settings(Section):
    """The pace."""

    step_s: float = Field(0.03, ge=0)


class Paced:
    """Two classes of points."""

    Settings = Settings
    defaults: Mapping[str, Any] = {"data": {"batch_size": 8}, "ema": {"decays": []}}

    def __init__(self, context: Context) -> None:
        self._settings: Any = context.settings

    def dataset(self, split: str) -> TensorDataset:
        """Ten steps an epoch; so are the other methods as the protocol has them."""
        inputs = torch.randn(80, 5, generator=torch.Generator().manual_seed(len(split)))
        return TensorDataset(inputs, (inputs.sum(1) > 0).long())

    def model(self) -> nn.Module:
        """One layer."""
        return nn.Linear(5, 2)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """After a sleep."""
        time.sleep(self._settings.step_s)
        inputs, labels = batch
        return cross_entropy(model(inputs), labels)

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Of each point."""
        inputs, labels = batch
        return {"loss": cross_entropy(model(inputs), labels, reduction="none")}

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        """The mean."""
        return {"loss": float(records["loss"].mean())}
