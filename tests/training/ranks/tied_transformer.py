"""A small language model as users write them: tied weights, dropout, a buffer in no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from holdfast.training.configuration.schema import Split
from holdfast.training.experiment.protocol import Batch, Context, Records

NUM_TOKENS, LENGTH, WIDTH = 37, 12, 32
NUM_SAMPLES: dict[Split, int] = {"train": 150, "validation": 40, "test": 40}


class Counting:
    """Rows of tokens int64 [LENGTH + 1] that go on by a step of their own, with some noise."""

    def __init__(self, split: Split) -> None:
        draws = torch.Generator().manual_seed(len(split))
        num = NUM_SAMPLES[split]
        first, step = (torch.randint(1, NUM_TOKENS, (num, 1), generator=draws) for _ in range(2))
        self._tokens = (first + step * torch.arange(LENGTH + 1)) % NUM_TOKENS
        self._is_train = split == "train"
        self.fingerprint = f"counting-{split}"

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.fetch([index])[0]

    def fetch(self, indices: Sequence[int]) -> Tensor:
        tokens = self._tokens[torch.as_tensor(indices)]
        if not self._is_train:
            return tokens
        noise = torch.randint(NUM_TOKENS, tokens.shape)
        return torch.where(torch.rand(tokens.shape) < 0.05, noise, tokens)


class Model(nn.Module):
    """Tokens [B, T] to logits [B, T, NUM_TOKENS]; the first layer's weights are the last's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, NUM_TOKENS)
        self.head.weight = self.embedding.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens) + self.places
        for block in self.blocks:
            states = block(states, src_mask=self.mask)
        logits: Tensor = self.head(states)
        return logits


class TiedTransformer:
    """Predict the next token."""

    defaults: ClassVar[dict[str, Any]] = {
        "data": {"batch_size": 24},
        "train": {"num_epochs": 2, "num_microbatches": 2, "clip_norm": 0.5},
        "optimizer": {"name": "AdamW", "args": {"lr": 3e-3}},
        "scheduler": {"name": "ReduceLROnPlateau", "args": {"factor": 0.5, "patience": 0}},
        "ema": {"decays": [0.9, 0.99]},
        "selection": {"metric": "accuracy", "mode": "max"},
        "distributed": {"strategy": "ddp"},
    }

    def __init__(self, context: Context) -> None:
        pass

    def dataset(self, split: Split) -> Counting:
        return Counting(split)

    def model(self) -> nn.Module:
        return Model()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        logits, expected = model(batch[:, :-1]), batch[:, 1:]
        loss = functional.cross_entropy(logits.transpose(1, 2), expected, reduction="none")
        return {
            "loss": loss.mean(1),
            "is_correct": (logits.argmax(2) == expected).float().mean(1),
        }

    def metrics(self, records: Records) -> dict[str, float]:
        return {
            "loss": float(records["loss"].mean()),
            "accuracy": float(records["is_correct"].mean()),
        }
