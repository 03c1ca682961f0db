"""A stand-in for the memory of a GPU, and for the streams that copy to it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from holdfast.training.device.reading import DeviceReader


class Far(Tensor):
    """A tensor that has to be copied before this machine can look at its bytes."""

    is_cpu = False

    def cpu(self, *_: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def numpy(self, **_: Any) -> NoReturn:
        raise TypeError("its bytes are not in this machine's memory")


class LastMoment:
    """A stream that copies once somebody waits for it, and not before."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        assert not self.pairs, "copied from memory that is written to again"
        self.pairs = [*pairs]

    def hold_back(self) -> None:
        self.wait()

    def wait(self) -> None:
        for target, source in self.pairs:
            target.copy_(source)
        self.pairs = []


class Forgetful(LastMoment):
    """One that loses what it was asked for."""

    def wait(self) -> None:
        self.pairs = []


class Short(LastMoment):
    """One of a device that is out of memory."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


class FarReader(DeviceReader):
    """What it reads is far."""

    def __init__(
        self,
        streams: Sequence[LastMoment] | None = None,
        free_bytes: int = 2**30,
        chunk_bytes: int = 1000,
    ) -> None:
        super().__init__(
            streams or [LastMoment() for _ in range(3)], lambda: free_bytes, chunk_bytes
        )
        self.num_read = 0

    def read(
        self, file: io.FileIO, num_bytes: int, digest: Callable[[memoryview], object]
    ) -> tuple[Tensor, int]:
        content, end = super().read(file, num_bytes, digest)
        self.num_read += 1
        return content.as_subclass(Far), end
