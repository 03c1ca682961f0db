"""What a type checker must know of the public face; ``make lint`` checks it, nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

from torch import Tensor, nn

import holdfast


class Settings(holdfast.Section):
    """Settings of an experiment."""

    width: int = 16


class Typed:
    """An experiment that is written with public names alone."""

    def __init__(self, context: holdfast.Context) -> None:
        assert_type(context.seed, int)
        assert_type(context.data_folder, Path | None)

    def dataset(self, split: holdfast.Split) -> holdfast.Dataset:
        """The data."""
        raise holdfast.DataNotFoundError(split)

    def model(self) -> nn.Module:
        """The model."""
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: holdfast.Batch) -> Tensor:
        """The loss."""
        loss: Tensor = model(batch[0])
        return loss

    def score(self, model: nn.Module, batch: holdfast.Batch) -> dict[str, Tensor]:
        """The records."""
        return {"loss": self.loss(model, batch)}

    def metrics(self, records: holdfast.Records) -> dict[str, float]:
        """The metrics."""
        return {"loss": float(records["loss"].mean())}

    def export_spec(self) -> holdfast.ExportSpec:
        """Names for the export."""
        return holdfast.ExportSpec(input_names=("x",))


experiment: holdfast.Experiment = Typed(holdfast.Context())
assert_type(holdfast.load_weights(Path("step-00000001")), dict[str, Tensor])
assert_type(holdfast.__version__, str)
assert_type(Settings().width, int)
error: holdfast.InputError = holdfast.ConfigError("a key")
batch: Any = holdfast.collate(experiment.dataset("train"), [])
