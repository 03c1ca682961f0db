"""When validation no longer improves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.training.configuration.schema import EarlyStoppingConfig


@dataclass(frozen=True)
class EarlyStopping:
    """The best value so far and how long ago it was. Immutable; ``after`` gives the next one."""

    best: float | None = None
    num_epochs_since_best: int = 0

    def after(
        self, value: float, config: EarlyStoppingConfig, mode: Literal["min", "max"]
    ) -> EarlyStopping:
        """The state after one more epoch with this validation value. NaN never improves."""
        if self._is_better(value, config.min_delta, mode):
            return EarlyStopping(best=value)
        return replace(self, num_epochs_since_best=self.num_epochs_since_best + 1)

    def should_stop(self, config: EarlyStoppingConfig) -> bool:
        """Whether patience has run out."""
        patience = config.patience_epochs
        return patience is not None and self.num_epochs_since_best >= patience

    def _is_better(self, value: float, min_delta: float, mode: Literal["min", "max"]) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if mode == "min" else value - self.best
        return gain > min_delta
