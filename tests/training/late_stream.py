"""A stand-in for a GPU's stream that copies as late as it is allowed to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LateStream:
    """Copies when the device is told to wait for the copies, and not before."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.num_copied: list[int] = []

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        assert not self.pairs
        self.pairs = [*pairs]

    def hold_back(self) -> None:
        for target, source in self.pairs:
            target.copy_(source)
        if self.pairs:
            self.num_copied.append(len(self.pairs))
        self.pairs = []

    def wait(self) -> None:
        assert not self.pairs, "written before anybody has waited for the copies"
