"""Data sets that loader processes can import."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.training.errors import DataFormatError


class Augmented:
    """Draws from every generator, in a pattern that leaves a normal number held back."""

    def __init__(self, num_items: int = 203) -> None:
        self.num_items = num_items

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[float, float, int]]:
        noise = torch.randn(3, 4) + np.random.randn() + random.gauss(0, 1)
        return noise + index, (np.random.rand(), random.random(), index)


class LongSums:
    """Sums whose rounding depends on the number of threads."""

    def __init__(self) -> None:
        self.values = torch.linspace(0.1, 1.7, 300_000)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return (self.values * (index + 1)).sum()

    def collate(self, items: list[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.stack(items), torch.zeros(len(items))


class Whole(Augmented):
    """Fetches a batch at once."""

    def fetch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.rand(len(indices), 2), torch.tensor(indices)


class Failing(Augmented):
    """Fails at one index."""

    def __init__(self, error: str) -> None:
        super().__init__(20)
        self.error = error

    def __getitem__(self, index: int) -> Any:
        if index != 13:
            return super().__getitem__(index)
        if self.error == "format":
            raise DataFormatError("line 13 has 2 columns, expected 3")
        if self.error == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("pixel out of range")


class Marking(Augmented):
    """Leaves the ids of the processes that fetched."""

    def __init__(self, folder: Path) -> None:
        super().__init__(40)
        self.folder = folder

    def __getitem__(self, index: int) -> Any:
        (self.folder / str(os.getpid())).touch()
        return super().__getitem__(index)


class Environment:
    """Tells about the process that fetches."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        names = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        is_deaf = all(signal.getsignal(name) == signal.SIG_IGN for name in names)
        return torch.zeros(2), (is_deaf, torch.get_num_threads(), os.getpid())
