"""A Transformer that is trained with PyTorch's modules and decodes token by token with a cache.

Shapes: B sentences, S source tokens, T target tokens, L layers, D features, V symbols.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from holdfast.training.experiments.translation.vocabulary import PAD


@dataclass(frozen=True)
class ModelSize:
    """How large a model is. ``max_tokens`` bounds S and T, the marks of begin and end included."""

    num_symbols: int
    max_tokens: int
    width: int
    num_layers: int
    num_heads: int
    feedforward: int
    dropout: float

    def cache_shape(self, num_sentences: int) -> tuple[int, int, int, int]:
        """Of the keys and values of all positions, [B, L, max_tokens, 2D]."""
        return (num_sentences, self.num_layers, self.max_tokens, 2 * self.width)


class TranslationModel(nn.Module):
    """Tokens of two sentences to what the second costs, given the first.

    One embedding serves source, target and output (Press and Wolf 2017). Layers normalise first
    (Xiong et al. 2020). The vocabulary's bytes are a buffer, so that every checkpoint and every
    export carries the vocabulary that its weights belong to.
    """

    def __init__(self, size: ModelSize, vocabulary: bytes) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("vocabulary", torch.tensor(list(vocabulary), dtype=torch.uint8))
        self.vocabulary: Tensor
        self.embedding = nn.Embedding(size.num_symbols, size.width)
        self.positions = nn.Embedding(size.max_tokens, size.width)
        self.dropout = nn.Dropout(size.dropout)
        options = {"dropout": size.dropout, "batch_first": True, "norm_first": True}
        shape = (size.width, size.num_heads, size.feedforward)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*shape, **options),  # type: ignore[arg-type]
            size.num_layers,
            nn.LayerNorm(size.width),
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(*shape, **options),  # type: ignore[arg-type]
            size.num_layers,
            nn.LayerNorm(size.width),
        )
        self._initialise()

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Costs of each target token after the first, both [B, T - 1] in nats, 0 at padding:

        of the token itself, and the mean over all symbols, which label smoothing needs.
        """
        logits_BTV = self.logits(source_BS, target_BT[:, :-1])
        next_BT = target_BT[:, 1:]
        logits_BTV = logits_BTV.float()
        total_BT = logits_BTV.logsumexp(-1)
        own_BT = total_BT - logits_BTV.gather(2, next_BT[..., None])[..., 0]
        mean_BT = total_BT - logits_BTV.mean(-1)
        is_padding = next_BT == PAD
        return own_BT.masked_fill(is_padding, 0), mean_BT.masked_fill(is_padding, 0)

    def logits(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the token after each target token."""
        is_padding = _is_padding(source_BS)
        mask_TT = nn.Transformer.generate_square_subsequent_mask(
            target_BT.shape[1], device=target_BT.device, dtype=self.embedding.weight.dtype
        )
        decoded_BTD = self.decoder(
            self._embedded(target_BT),
            self._memory(source_BS),
            tgt_mask=mask_TT,
            memory_key_padding_mask=is_padding,
            tgt_is_causal=True,
            memory_is_causal=False,
        )
        return functional.linear(decoded_BTD, self.embedding.weight)

    def encode(self, source_BS: Tensor) -> Tensor:
        """What every step reads of the source: keys and values of each layer, [B, L, S, 2D]."""
        memory_BSD = self._memory(source_BS)
        parts = [_keys_values(layer.multihead_attn, memory_BSD) for layer in self._decoder_layers()]
        is_padding = _is_padding(source_BS)[:, None, :, None]
        # Eager PyTorch and other runtimes disagree about what stands at padding.
        return torch.stack(parts, dim=1).masked_fill(is_padding, 0)

    def empty_cache(self, num_sentences: int) -> Tensor:
        """What the first step is given as cache, [B, L, max_tokens, 2D]."""
        return self.embedding.weight.new_zeros(self.size.cache_shape(num_sentences))

    def step(
        self,
        token_B: Tensor,
        position_B: Tensor,
        source_BS: Tensor,
        memory_BLSE: Tensor,
        cache_BLTE: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, V] of the token after ``token``, which stands at ``position``, and the cache
        [B, L, max_tokens, 2D] with the keys and values of this position in it.
        """
        place_T = torch.arange(cache_BLTE.shape[2], device=token_B.device)
        is_here_BT1 = (place_T == position_B[:, None])[..., None]
        is_past_BT = place_T <= position_B[:, None]
        is_source_BS = ~_is_padding(source_BS)
        x_BD = self._embedded(token_B[:, None], position_B[:, None])[:, 0]
        caches = []
        for number, layer in enumerate(self._decoder_layers()):
            normed_BD = layer.norm1(x_BD)
            own_BE = _keys_values(layer.self_attn, normed_BD)
            cache_BTE = torch.where(is_here_BT1, own_BE[:, None], cache_BLTE[:, number])
            caches.append(cache_BTE)
            x_BD = x_BD + _attend(layer.self_attn, normed_BD, cache_BTE, is_past_BT)
            memory_BSE = memory_BLSE[:, number]
            x_BD = x_BD + _attend(layer.multihead_attn, layer.norm2(x_BD), memory_BSE, is_source_BS)
            hidden = functional.relu(layer.linear1(layer.norm3(x_BD)))
            x_BD = x_BD + layer.linear2(hidden)
        normed_BD = cast(nn.LayerNorm, self.decoder.norm)(x_BD)
        return functional.linear(normed_BD, self.embedding.weight), torch.stack(caches, dim=1)

    def _memory(self, source_BS: Tensor) -> Tensor:
        memory: Tensor = self.encoder(
            self._embedded(source_BS), src_key_padding_mask=_is_padding(source_BS)
        )
        return memory

    def _embedded(self, tokens_BT: Tensor, position_BT: Tensor | None = None) -> Tensor:
        if position_BT is None:
            position_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        scaled = self.embedding(tokens_BT) * math.sqrt(self.size.width)
        embedded: Tensor = self.dropout(scaled + self.positions(position_BT))
        return embedded

    def _decoder_layers(self) -> list[nn.TransformerDecoderLayer]:
        return cast(list[nn.TransformerDecoderLayer], list(self.decoder.layers))

    def _initialise(self) -> None:
        """Layers are copies of one another until each is drawn by itself."""
        for name, parameter in self.named_parameters():
            if "embedding" in name or "positions" in name:
                nn.init.normal_(parameter, std=self.size.width**-0.5)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


class EncoderGraph(TranslationModel):
    """The same weights, with ``encode`` as what is called."""

    def forward(self, source_BS: Tensor) -> Tensor:  # type: ignore[override]
        """See ``encode``."""
        return self.encode(source_BS)


class StepGraph(TranslationModel):
    """The same weights, with ``step`` as what is called."""

    def forward(  # type: ignore[override]
        self, token: Tensor, position: Tensor, source: Tensor, memory: Tensor, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``step``."""
        return self.step(token, position, source, memory, cache)


def _is_padding(tokens_BS: Tensor) -> Tensor:
    """Never the first position: a softmax over nothing is NaN in some runtimes."""
    return (tokens_BS == PAD) & (torch.arange(tokens_BS.shape[1], device=tokens_BS.device) > 0)


def _keys_values(attention: nn.MultiheadAttention, features: Tensor) -> Tensor:
    """[..., D] to [..., 2D]."""
    width = attention.embed_dim
    assert attention.in_proj_weight is not None
    return functional.linear(
        features, attention.in_proj_weight[width:], attention.in_proj_bias[width:]
    )


def _attend(
    attention: nn.MultiheadAttention, query_BD: Tensor, keys_values_BTE: Tensor, is_seen_BT: Tensor
) -> Tensor:
    """One query for each sentence, [B, D]; the attention's own arithmetic, with known keys."""
    width, num_heads = attention.embed_dim, attention.num_heads
    assert attention.in_proj_weight is not None
    query_BD = functional.linear(
        query_BD, attention.in_proj_weight[:width], attention.in_proj_bias[:width]
    )
    query, keys, values = (
        torch.unflatten(part, -1, (num_heads, width // num_heads)).transpose(1, 2)
        for part in (query_BD[:, None], *keys_values_BTE.chunk(2, dim=-1))
    )
    attended = functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=is_seen_BT[:, None, None, :]
    )
    out: Tensor = attention.out_proj(attended.transpose(1, 2).flatten(2))
    return out[:, 0]
