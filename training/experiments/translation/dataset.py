"""Encoded sentence pairs as batches of token numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.training.experiment.protocol import Batch
from holdfast.training.experiments.translation.vocabulary import PAD

Item = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Rows:
    """Rows of token numbers of different lengths, in one array."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._starts = np.array([0, *accumulate(map(len, rows))])
        self._ids = np.fromiter((i for row in rows for i in row), np.int64, self._starts[-1])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self._starts)

    def padded(self, indices: npt.NDArray[np.int64], width: int | None) -> Tensor:
        """Chosen rows, int64 [B, width]; without a width, as wide as the longest of them."""
        rows = [self._ids[self._starts[index] : self._starts[index + 1]] for index in indices]
        width = width or max(map(len, rows))
        batch = np.full((len(rows), width), PAD)
        for line, row in zip(batch, rows, strict=True):
            line[: len(row)] = row
        return torch.from_numpy(batch)


class TranslationDataset:
    """Items ``((source [S], target [T]), (sentence, is_translated))``.

    Source rows end with EOS; target rows also begin with BOS. ``sentence`` is the number of the
    source sentence in the corpus; ``num_translated`` items, spread over all, are to be translated.
    Batches are padded to their longest row, or to sources of ``width`` tokens and targets of one
    more.
    """

    def __init__(
        self,
        source: Rows,
        target: Rows,
        sentences: npt.NDArray[np.int64],
        *,
        num_translated: int,
        width: int | None,
        fingerprint: str,
    ) -> None:
        self._source, self._target, self._sentences = source, target, sentences
        self._is_translated = np.zeros(len(sentences), dtype=np.bool_)
        # Spread, because corpora are often sorted by length.
        spread = np.linspace(0, len(sentences) - 1, min(num_translated, len(sentences)))
        self._is_translated[spread.round().astype(np.int64)] = True
        self._width = width
        self.lengths = np.maximum(source.lengths, target.lengths)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._sentences)

    def __getitem__(self, index: int) -> Item:
        inputs, targets = self.fetch([index])
        return tuple(t[0] for t in inputs), tuple(t[0] for t in targets)

    def fetch(self, indices: Sequence[int]) -> Batch:
        """A batch ``((source [B, S], target [B, T]), (sentence [B], is_translated [B]))``."""
        chosen = np.asarray(indices, dtype=np.int64)
        inputs = (
            self._source.padded(chosen, self._width),
            self._target.padded(chosen, self._width and self._width + 1),
        )
        is_translated = torch.from_numpy(self._is_translated[chosen])
        return inputs, (torch.from_numpy(self._sentences[chosen]), is_translated)
