"""Two small experiments that have what makes exports go wrong."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from holdfast.training.experiment.protocol import Batch, Context, Records
from holdfast.training.export.specification import ExportSpec

NUM_TOKENS = 20
LENGTH = 8


class Samples:
    def __init__(self, inputs: tuple[Tensor, ...], targets: Tensor) -> None:
        self._inputs = inputs
        self._targets = targets
        self.fingerprint = "generated"

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Any:
        return tuple(tensor[index] for tensor in self._inputs), self._targets[index]


class Classifier:
    """What both experiments share: targets are classes, metrics are loss and accuracy."""

    def __init__(self, context: Context) -> None:
        self._seed = context.seed

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.score(model, batch)["loss"].mean()

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        inputs, targets = batch
        logits = model(*inputs)["logits"]
        return {
            "loss": functional.cross_entropy(logits, targets, reduction="none"),
            "correct": (logits.argmax(1) == targets).float(),
        }

    def metrics(self, records: Records) -> dict[str, float]:
        return {name: float(np.mean(records[name])) for name in ("loss", "correct")}


class PicturesModel(nn.Module):
    """Scaler in fp64, convolution, batch norm, dropout, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(5.0, dtype=torch.float64))
        self.register_buffer("deviation", torch.tensor(2.5, dtype=torch.float64))
        self.convolution = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(8 * 4, 3)
        self.amount = nn.Linear(8 * 4, 1)
        with torch.no_grad():
            self.norm.running_mean += torch.randn(8) * 0.3  # type: ignore[operator]
            self.norm.running_var += torch.rand(8)  # type: ignore[operator]

    def scaled(self, images: Tensor) -> Tensor:
        return ((images.double() - self.mean) / self.deviation).to(self.classifier.weight.dtype)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = functional.relu(self.norm(self.convolution(self.scaled(images))))
        features = self.dropout(functional.max_pool2d(features, 3).flatten(1))
        return {"logits": self.classifier(features), "amount": self.amount(features)[:, 0]}


class Pictures(Classifier):
    """Images 1x6x6 with pixels around 5."""

    def dataset(self, split: str) -> Samples:
        number = {"train": 0, "validation": 1, "test": 2}[split]
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(60, 1, 6, 6, generator=generator) * 2.5 + 5
        return Samples((images,), images.mean(dim=(1, 2, 3)).ge(5).long())

    def model(self) -> nn.Module:
        return PicturesModel()

    def export_spec(self) -> ExportSpec:
        return ExportSpec(
            class_names={"logits": ("low", "high", "other")}, task="image-classification"
        )


class SequencesModel(nn.Module):
    """Embedding, bidirectional LSTM, mean over unmasked positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden, _ = self.lstm(self.embedding(ids))
        weights = mask.to(hidden.dtype)[..., None]
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return {"logits": self.classifier(self.norm(mean))}


def sequences(number: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, NUM_TOKENS, (len(lengths), LENGTH), generator=generator)
    return ids, torch.arange(LENGTH) < lengths[:, None]


class Sequences(Classifier):
    """Token ids [8] and a mask of what is there."""

    def dataset(self, split: str) -> Samples:
        number = {"train": 0, "validation": 1, "test": 2}[split]
        lengths = torch.arange(60) % LENGTH + 1
        inputs = sequences(number, lengths)
        return Samples(inputs, inputs[0][:, 0] % 3)

    def model(self) -> nn.Module:
        return SequencesModel()

    def export_spec(self) -> ExportSpec:
        return ExportSpec(
            probes={
                "shortest": sequences(3, torch.full((4,), 1)),
                "longest": sequences(4, torch.full((4,), LENGTH)),
                "padded": sequences(5, torch.tensor([1, 8, 3, 2])),
            }
        )


class TiedModel(nn.Module):
    """Scores tokens with the weights that embed them: one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 6)
        self.hidden = nn.Linear(6, 6)
        self.scorer = nn.Linear(6, NUM_TOKENS, bias=False)
        self.scorer.weight = self.embedding.weight

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        weights = mask.to(self.hidden.weight.dtype)[..., None]
        mean = (torch.tanh(self.hidden(self.embedding(ids))) * weights).sum(1) / weights.sum(1)
        return {"logits": self.scorer(mean)}


class TiedSequences(Sequences):
    """As Sequences, with tied weights."""

    def model(self) -> nn.Module:
        return TiedModel()


class CrashingSequences(Sequences):
    """Its score ends the process when an ONNX session stands in the model's place."""

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        run = getattr(model, "_run", None)
        if "Onnx" in type(getattr(run, "__self__", None)).__name__:
            os.abort()
        return super().score(model, batch)
