"""A GPT-2 of 124 M parameters on random tokens, to measure on a GPU; smaller ones by settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from holdfast import Context, Section

HEAD_WIDTH = 64
Tokens = tuple[Tensor, Tensor]


class Settings(Section):
    """The sizes of GPT-2 small."""

    layers: int = Field(12, ge=1)
    width: int = Field(768, ge=HEAD_WIDTH)
    context: int = Field(1024, ge=8)
    vocabulary: int = Field(50304, ge=16)
    samples: int = Field(4096, ge=16)
    dropout: float = Field(0.1, ge=0, lt=1)


class Block(nn.Module):
    """Attention, then two layers; what they give is added."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attended, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] in and out."""
        batch, length, width = x.shape
        shape = (batch, length, 3, width // HEAD_WIDTH, HEAD_WIDTH)
        query, key, value = self.attended(self.before(x)).view(shape).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attention = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=dropout
        )
        mixed = self.out(attention.transpose(1, 2).reshape(batch, length, width))
        x = x + functional.dropout(mixed, self.dropout, self.training)
        wide = self.down(functional.gelu(self.up(self.between(x))))
        return x + functional.dropout(wide, self.dropout, self.training)


class GPT(nn.Module):
    """Embeddings, blocks, and a head that is tied to the embedding of tokens."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.tokens = nn.Embedding(settings.vocabulary, settings.width)
        self.places = nn.Embedding(settings.context, settings.width)
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.dropout) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, settings.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to logits [B, T, vocabulary]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.places(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class RandomTokens:
    """Sequences that nothing can be learned from, and the same one further."""

    def __init__(self, settings: Settings, split: str) -> None:
        num = settings.samples if split == "train" else 64
        draws = torch.Generator().manual_seed(len(split))
        shape = (num, settings.context + 1)
        self._tokens = torch.randint(settings.vocabulary, shape, generator=draws).int()

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Tokens:
        row = self._tokens[index].long()
        return row[:-1], row[1:]

    def fetch(self, indices: Sequence[int]) -> Tokens:
        """A batch at once."""
        rows = self._tokens[torch.as_tensor(indices)].long()
        return rows[:, :-1], rows[:, 1:]


class Task:
    """Predict the next token, in bf16, with a fused AdamW, clipping and one average."""

    Settings = Settings
    defaults: Mapping[str, Any] = {
        "data": {"batch_size": 16, "evaluation_batch_size": 16},
        "train": {"num_epochs": 1, "precision": "bf16", "clip_norm": 1.0},
        "optimizer": {"name": "AdamW", "args": {"lr": 3e-4, "fused": True}},
        "ema": {"decays": [0.999]},
    }

    def __init__(self, context: Context) -> None:
        self._settings: Any = context.settings

    def dataset(self, split: str) -> RandomTokens:
        """As the protocol has it; so are the others."""
        return RandomTokens(self._settings, split)

    def model(self) -> nn.Module:
        """In fp32."""
        return GPT(self._settings)

    def loss(self, model: nn.Module, batch: Tokens) -> Tensor:
        """The mean over all tokens."""
        tokens, following = batch
        return functional.cross_entropy(model(tokens).flatten(0, 1).float(), following.flatten())

    def score(self, model: nn.Module, batch: Tokens) -> dict[str, Tensor]:
        """Of each sequence."""
        tokens, following = batch
        logits = model(tokens).float().transpose(1, 2)
        return {"loss": functional.cross_entropy(logits, following, reduction="none").mean(1)}

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        """The mean over sequences."""
        return {"loss": float(records["loss"].mean())}
