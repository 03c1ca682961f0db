"""Finds the first loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.training.errors import NonFiniteLossError
from holdfast.training.spikes.watch import SpikeWatch


class LossGuard:
    """Finds the first loss that is NaN or infinite.

    On the CPU it does so at once. On a GPU, where looking would stall the queue at every step, the
    place is noted on the device and read by ``check``.
    """

    def __init__(
        self,
        device: torch.device,
        explain: Callable[[], str] = lambda: "",
        watch: SpikeWatch | None = None,
    ) -> None:
        """``explain`` tells what may have made a loss so, before the step changes anything.

        ``watch`` is asked first, where spikes are watched.
        """
        self._explain = explain
        self._watch = watch
        self._is_immediate = device.type == "cpu"
        self._first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)

    def observe(self, loss: Tensor, step: int, batch: int) -> None:
        """Look at the loss of a microbatch of step ``step``, which is batch ``batch``."""
        if self._is_immediate:
            if not math.isfinite(loss.item()):
                _raise_non_finite(loss.item(), step, batch, self._explain())
            return
        place = torch.tensor([step, batch]).to(loss.device, non_blocking=True)
        is_first = (self._first_bad[0] < 0) & ~torch.isfinite(loss)
        self._first_bad = torch.where(is_first, place, self._first_bad)

    def observe_step(self, loss: Tensor, step: int) -> None:
        """Look at the loss of a whole step. Raises LossJumpError or NonFiniteLossError."""
        if self._watch is not None:
            self._watch.observe(loss, step)

    def check(self) -> None:
        """Raise NonFiniteLossError if a loss was not finite, LossJumpError if one has jumped.

        Waits for the GPU.
        """
        self.check_later()()

    def check_later(self) -> Callable[[], None]:
        """What does as ``check`` for the losses so far, in any thread.

        Only where spikes are watched this waits for the GPU, and raises.
        """
        if self._watch is not None:
            self._watch.check()
        first_bad = self._first_bad  # a new tensor with each loss

        def check() -> None:
            if not self._is_immediate and (place := first_bad.tolist())[0] >= 0:
                _raise_non_finite(math.nan, *place)

        return check


def _raise_non_finite(loss: float, step: int, batch: int, cause: str = "") -> None:
    told = f"; {cause}" if cause else ""
    raise NonFiniteLossError(
        f"the loss of step {step} (batch {batch} of its pass over the data) is {loss}{told}; "
        f"nothing was saved since the last checkpoint: lower the learning rate, clip gradients, or "
        f"check the data",
        step=step,
        batch=batch,
    )
