"""A GPT: a Transformer that reads a text from left to right and tells the next token.

Shapes: B texts, T tokens of them, C tokens of context, L layers, D features, V symbols.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

INITIAL_STD = 0.02
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class ModelSize:
    """How large a model is, and how it knows where a token stands."""

    num_symbols: int
    context: int
    width: int
    num_layers: int
    num_heads: int
    dropout: float = 0.0
    has_biases: bool = False
    is_rotary: bool = False

    def cache_shape(self, num_texts: int) -> tuple[int, int, int, int]:
        """Of the keys and values of all positions, [B, L, C, 2D]."""
        return (num_texts, self.num_layers, self.context, 2 * self.width)


class Block(nn.Module):
    """Attention to what stands before, then a feed-forward network; both normalise first."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        width, has_biases = size.width, size.has_biases
        self.num_heads, self.dropout = size.num_heads, size.dropout
        self.norm_1 = nn.LayerNorm(width, bias=has_biases)
        self.attention_in = nn.Linear(width, 3 * width, bias=has_biases)
        self.attention_out = nn.Linear(width, width, bias=has_biases)
        self.norm_2 = nn.LayerNorm(width, bias=has_biases)
        self.feedforward_in = nn.Linear(width, 4 * width, bias=has_biases)
        self.feedforward_out = nn.Linear(4 * width, width, bias=has_biases)
        self.drop = nn.Dropout(size.dropout)

    def forward(self, x_BTD: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output [B, T, D], and its keys and values, both [B, H, T, D / H]."""
        query, keys, values = self._projected(x_BTD, rotation)
        attended = scaled_dot_product_attention(
            query, keys, values, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self._rest(x_BTD, attended), keys, values

    def step(
        self, x_B1D: Tensor, rotation: Tensor | None, cache_BCE: Tensor, position_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output [B, 1, D] at one position, and the cache [B, C, 2D] with it."""
        query, key, value = self._projected(x_B1D, rotation)
        own_B1E = _cached(key, value)
        place_C = torch.arange(cache_BCE.shape[1], device=x_B1D.device)
        is_here_BC1 = (place_C == position_B[:, None])[..., None]
        cache_BCE = torch.where(is_here_BC1, own_B1E, cache_BCE)
        is_past = (place_C <= position_B[:, None])[:, None, None, :]
        keys, values = (self._by_head(part) for part in cache_BCE.chunk(2, dim=-1))
        attended = scaled_dot_product_attention(query, keys, values, attn_mask=is_past)
        return self._rest(x_B1D, attended), cache_BCE

    def _projected(self, x_BTD: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.attention_in(self.norm_1(x_BTD)).chunk(3, dim=-1)
        query, key, value = (self._by_head(part) for part in parts)
        if rotation is not None:
            query, key = _rotated(query, rotation), _rotated(key, rotation)
        return query, key, value

    def _by_head(self, features_BTD: Tensor) -> Tensor:
        width = features_BTD.shape[-1] // self.num_heads
        return torch.unflatten(features_BTD, -1, (self.num_heads, width)).transpose(1, 2)

    def _rest(self, x_BTD: Tensor, attended: Tensor) -> Tensor:
        x_BTD = x_BTD + self.drop(self.attention_out(_flat(attended)))
        hidden = self.feedforward_out(gelu(self.feedforward_in(self.norm_2(x_BTD))))
        out: Tensor = x_BTD + self.drop(hidden)
        return out


class Gpt(nn.Module):
    """Tokens to what each next token costs.

    One embedding serves input and output (Press and Wolf 2017); positions are learnt or rotary (Su
    et al. 2021); weights begin as GPT-2's (Radford et al. 2019). The vocabulary's bytes are a
    buffer, so that every checkpoint and every export carries the vocabulary that its weights
    belong to.
    """

    def __init__(self, size: ModelSize, vocabulary: bytes) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("vocabulary", torch.tensor(list(vocabulary), dtype=torch.uint8))
        self.vocabulary: Tensor
        self.embedding = nn.Embedding(size.num_symbols, size.width)
        self.positions = None if size.is_rotary else nn.Embedding(size.context, size.width)
        self.drop = nn.Dropout(size.dropout)
        self.blocks = nn.ModuleList([Block(size) for _ in range(size.num_layers)])
        self.norm = nn.LayerNorm(size.width, bias=size.has_biases)
        self._initialise()

    def forward(self, tokens_BT: Tensor, next_BT: Tensor) -> Tensor:
        """What each next token costs in nats, [B, T]."""
        logits_BTV = linear(self._hidden(tokens_BT)[0], self.embedding.weight).float()
        own_BT1 = logits_BTV.gather(2, next_BT[..., None])
        return logits_BTV.logsumexp(-1) - own_BT1[..., 0]

    def prefill(self, tokens_BC: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, V] of the token after the first ``length`` of some tokens, and their cache
        [B, L, C, 2D], with zeros after them.
        """
        hidden_BCD, caches = self._hidden(tokens_BC)
        place_C = torch.arange(tokens_BC.shape[1], device=tokens_BC.device)
        is_last_BC = place_C == length_B[:, None] - 1
        last_BD = (hidden_BCD * is_last_BC[..., None]).sum(1)
        is_after = (place_C >= length_B[:, None])[:, None, :, None]
        cache = torch.stack([_cached(*pair) for pair in caches], dim=1).masked_fill(is_after, 0)
        return linear(last_BD, self.embedding.weight), cache

    def step(self, token_B: Tensor, position_B: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, V] of the token after ``token``, which stands at ``position``, and the cache
        [B, L, C, 2D] with the keys and values of this position in it.
        """
        x_B1D = self._embedded(token_B[:, None], position_B[:, None])
        rotation = self._rotation(position_B[:, None])
        caches = []
        for number, block in enumerate(self._blocks()):
            x_B1D, own = block.step(x_B1D, rotation, cache[:, number], position_B)
            caches.append(own)
        logits = linear(self.norm(x_B1D)[:, 0], self.embedding.weight)
        return logits, torch.stack(caches, dim=1)

    def _hidden(self, tokens_BT: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        position_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        x_BTD, rotation = self._embedded(tokens_BT, position_1T), self._rotation(position_1T)
        caches = []
        for block in self._blocks():
            x_BTD, *keys_values = block(x_BTD, rotation)
            caches.append(keys_values)
        return self.norm(x_BTD), caches

    def _embedded(self, tokens_BT: Tensor, position_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(position_BT)
        out: Tensor = self.drop(x_BTD)
        return out

    def _rotation(self, position_BT: Tensor) -> Tensor | None:
        """Cosines and sines of each pair of a head's features, [2, B, 1, T, D / 2H]."""
        if self.positions is not None:
            return None
        num_pairs = self.size.width // self.size.num_heads // 2
        weight = self.embedding.weight
        number = torch.arange(num_pairs, device=weight.device, dtype=weight.dtype)
        angle = position_BT[..., None] * torch.exp(-math.log(ROTARY_BASE) * number / num_pairs)
        return torch.stack((angle.cos(), angle.sin()))[:, :, None]

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _initialise(self) -> None:
        out_std = INITIAL_STD / math.sqrt(2 * self.size.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=out_std if "_out." in name else INITIAL_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class PrefillGraph(Gpt):
    """The same weights, with ``prefill`` as what is called."""

    def forward(self, tokens_BC: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """See ``prefill``."""
        return self.prefill(tokens_BC, length_B)


class StepGraph(Gpt):
    """The same weights, with ``step`` as what is called."""

    def forward(  # type: ignore[override]
        self, token: Tensor, position: Tensor, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``step``."""
        return self.step(token, position, cache)


def _rotated(features: Tensor, rotation: Tensor) -> Tensor:
    """Features [B, H, T, W] of a head, each pair of them turned by its angle."""
    cosine, sine = rotation[0], rotation[1]
    one, other = features.chunk(2, dim=-1)
    return torch.cat((one * cosine - other * sine, one * sine + other * cosine), dim=-1)


def _flat(by_head: Tensor) -> Tensor:
    return by_head.transpose(1, 2).flatten(2)


def _cached(keys: Tensor, values: Tensor) -> Tensor:
    """Keys and values as they are kept, [B, T, 2D]."""
    return torch.cat((_flat(keys), _flat(values)), dim=-1)
