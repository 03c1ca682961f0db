"""From a model's next-token logits to a sentence: greedy, and beam search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from holdfast.training.experiments.translation.vocabulary import BOS, EOS, PAD


class Translator(Protocol):
    """What decodes step by step; see ``TranslationModel`` for shapes."""

    def encode(self, source_BS: Tensor, /) -> Tensor:
        """What every step reads of the source sentences."""
        ...

    def empty_cache(self, num_sentences: int, /) -> Tensor:
        """The cache of the first step."""
        ...

    def step(
        self, token: Tensor, position: Tensor, source: Tensor, memory: Tensor, cache: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, V] of the next token, and the next step's cache."""
        ...


@dataclass(frozen=True)
class Beam:
    """How wide to search; a hypothesis of n tokens scores log p / ((5 + n) / 6) ** penalty.

    Wu et al. 2016, "Google's Neural Machine Translation System", equation 14, without coverage.
    """

    size: int
    penalty: float

    def weight(self, num_tokens: int) -> float:
        """What the log probability of so many tokens, EOS included, is divided by."""
        return float(((5 + num_tokens) / 6) ** self.penalty)


def greedy(translator: Translator, source_BS: Tensor, max_tokens: int) -> Tensor:
    """The most probable token after each other, int64 [B, max_tokens].

    A row ends with EOS and is PAD after it; one that does not end has ``max_tokens`` tokens.
    """
    num = len(source_BS)
    memory, cache = translator.encode(source_BS), translator.empty_cache(num)
    hypotheses = source_BS.new_full((num, max_tokens), PAD)
    token = source_BS.new_full((num,), BOS)
    has_ended = torch.zeros_like(token, dtype=torch.bool)
    for place in range(max_tokens):
        position = torch.full_like(token, place)
        logits, cache = translator.step(token, position, source_BS, memory, cache)
        token = logits.argmax(-1).masked_fill(has_ended, PAD)
        hypotheses[:, place] = token
        has_ended |= token == EOS
        if bool(has_ended.all()):
            break
    return hypotheses


def beam_search(translator: Translator, source_BS: Tensor, max_tokens: int, beam: Beam) -> Tensor:
    """The best hypothesis found, int64 [B, max_tokens], as ``greedy`` returns them.

    ``beam.size`` unfinished hypotheses are kept for each sentence. The search goes on until no
    unfinished one can score better than the best finished one. One that is cut off at
    ``max_tokens`` counts only where none has ended.
    """
    search = _Search(translator, source_BS, max_tokens, beam)
    for place in range(max_tokens):
        search.advance(place)
        if search.is_settled():
            break
    return search.result()


class _Search:
    """Hypotheses of B sentences, K each. Rows of tensors for all are sentence-major."""

    def __init__(
        self, translator: Translator, source_BS: Tensor, max_tokens: int, beam: Beam
    ) -> None:
        num = len(source_BS)
        self._translator, self._max_tokens, self._beam = translator, max_tokens, beam
        self._source = source_BS.repeat_interleave(beam.size, dim=0)
        self._memory = translator.encode(source_BS).repeat_interleave(beam.size, dim=0)
        self._cache = translator.empty_cache(num * beam.size)
        self._tokens_BKT = source_BS.new_full((num, beam.size, max_tokens), PAD)
        self._last_BK = source_BS.new_full((num, beam.size), BOS)
        # All begin alike: only the first counts, or the beam would hold copies.
        self._scores_BK = self._cache.new_full((num, beam.size), -torch.inf, dtype=torch.float32)
        self._scores_BK[:, 0] = 0
        self._best_BT = source_BS.new_full((num, max_tokens), PAD)
        self._best_score_B = self._scores_BK.new_full((num,), -torch.inf)

    def advance(self, place: int) -> None:
        """One token more for every hypothesis."""
        num, size = self._scores_BK.shape
        position = torch.full_like(self._last_BK, place).flatten()
        logits, cache = self._translator.step(
            self._last_BK.flatten(), position, self._source, self._memory, self._cache
        )
        costs = torch.log_softmax(logits.float(), dim=-1).view(num, size, -1)
        totals_BKV = self._scores_BK[..., None] + costs
        self._finish(totals_BKV[..., EOS], place)
        totals_BKV[..., EOS] = -torch.inf
        num_symbols = totals_BKV.shape[-1]
        self._scores_BK, chosen_BK = totals_BKV.flatten(1).topk(size)
        parent_BK = chosen_BK // num_symbols
        self._last_BK = chosen_BK % num_symbols
        self._tokens_BKT = self._tokens_BKT.gather(
            1, parent_BK[..., None].expand(-1, -1, self._max_tokens)
        )
        self._tokens_BKT[..., place] = self._last_BK
        first_B1 = torch.arange(num, device=parent_BK.device)[:, None] * size
        self._cache = cache[(first_B1 + parent_BK).flatten()]

    def is_settled(self) -> bool:
        """Whether nothing unfinished can win: its score falls, and the weight only grows so far."""
        largest = self._beam.weight(self._max_tokens)
        return bool((self._best_score_B >= self._scores_BK[:, 0] / largest).all())

    def result(self) -> Tensor:
        """The best of each sentence."""
        has_ended = torch.isfinite(self._best_score_B)[:, None]
        return torch.where(has_ended, self._best_BT, self._tokens_BKT[:, 0])

    def _finish(self, totals_BK: Tensor, place: int) -> None:
        """Keep a hypothesis that ends at ``place`` where it is the best so far."""
        score_B, which_B = (totals_BK / self._beam.weight(place + 1)).max(dim=1)
        ended_BT = self._tokens_BKT[torch.arange(len(which_B), device=which_B.device), which_B]
        ended_BT[:, place] = EOS
        is_better = score_B > self._best_score_B
        self._best_BT = torch.where(is_better[:, None], ended_BT, self._best_BT)
        self._best_score_B = torch.where(is_better, score_B, self._best_score_B)
