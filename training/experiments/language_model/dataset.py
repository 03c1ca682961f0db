"""Windows of a text as batches of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from holdfast.training.experiment.protocol import Batch
from holdfast.training.experiments.language_model.tokens import TokenFile

Item = tuple[tuple[Tensor, Tensor], Tensor]


class Windows:
    """Items ``((tokens [C], next tokens [C]), is_continued)``, ``stride`` tokens apart.

    ``num_continued`` items, spread over all, are those whose second half a model is to write.
    """

    def __init__(
        self, file: TokenFile, context: int, *, stride: int, num_continued: int, fingerprint: str
    ) -> None:
        self._file, self._context, self._stride = file, context, stride
        self._num_items = (file.num_tokens - context - 1) // stride + 1
        spread = np.linspace(0, self._num_items - 1, min(num_continued, self._num_items))
        self._continued = np.unique(spread.round().astype(np.int64))
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, index: int) -> Item:
        (tokens, following), is_continued = self.fetch([index])
        return (tokens[0], following[0]), is_continued[0]

    def fetch(self, indices: Sequence[int]) -> Batch:
        """A batch ``((tokens [B, C], next tokens [B, C]), is_continued [B])``."""
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self._num_items:
            raise IndexError(f"windows are numbered 0 to {self._num_items - 1}, found {chosen}")
        places = chosen[:, None] * self._stride + np.arange(self._context + 1)
        rows = torch.from_numpy(self._file.tokens[places].astype(np.int64))
        is_continued = torch.from_numpy(np.isin(chosen, self._continued))
        return (rows[:, :-1].contiguous(), rows[:, 1:].contiguous()), is_continued
