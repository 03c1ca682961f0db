"""What copies beside a device's computation, and says when the copies are done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class CopyStream(Protocol):
    """What runs copies beside the computation of one device."""

    device: torch.device

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy each second into the first, after all that the device was asked for before."""
        ...

    def hold_back(self) -> None:
        """Let what the device is asked for from now on wait for these copies."""
        ...

    def wait(self) -> None:
        """Return when the copies are done, and all that came before them; in any thread."""
        ...


class GpuStream:
    """A stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """As the protocol says; targets are pinned."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            self._done.record()

    def hold_back(self) -> None:
        """As the protocol says."""
        torch.cuda.current_stream(self.device).wait_event(self._done)

    def wait(self) -> None:
        """As the protocol says."""
        self._done.synchronize()


def copy_stream(device: torch.device) -> CopyStream | None:
    """What copies beside the computation of a device; None where nothing does."""
    if device.type != "cuda":
        return None
    return GpuStream(torch.device("cuda", torch.cuda.current_device()))
