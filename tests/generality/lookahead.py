"""An optimizer and a scheduler of somebody's own, beside the experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Lookahead(SGD):
    """SGD whose weights go halfway back to slow ones every few steps (Zhang et al. 2019)."""

    def __init__(self, params: Iterable[Any], lr: float, every: int = 5) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        for group in self.param_groups:
            group.update(every=every, num_steps=0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        found = super().step(closure)
        for group in self.param_groups:
            group["num_steps"] += 1
            for parameter in group["params"]:
                slow: Tensor = self.state[parameter].setdefault("slow", parameter.clone())
                if group["num_steps"] % group["every"] == 0:
                    slow.lerp_(parameter, 0.5)
                    parameter.copy_(slow)
        return found


class Sawtooth(LRScheduler):
    """Down a line, and up at once."""

    def __init__(self, optimizer: Optimizer, period: int) -> None:
        self.period = period
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [base * (1 - self.last_epoch % self.period / self.period) for base in self.base_lrs]
