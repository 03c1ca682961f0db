"""The learning rate of a script's own schedulers, as the state of a training knows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from holdfast.training.optimizers.rate_trace import RateTrace


class KeptRates:
    """Records what the rate was. The schedulers are the script's, and move when it says so."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._optimizer = next(iter(optimizers.values()), None)
        self._num_steps = 0
        self.trace = RateTrace()
        self.trace.record(0, self.rate)

    @property
    def rate(self) -> float:
        """The rate of the first optimizer's first group; 0 where there is none."""
        return 0.0 if self._optimizer is None else float(self._optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Take the rate that the next step will have."""
        self._num_steps += 1
        self.trace.record(self._num_steps, self.rate)

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, and the trace."""
        return {"num_steps": self._num_steps, "scheduler": {}, "trace": self.trace.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._num_steps = state["num_steps"]
        self.trace = RateTrace.restored(state["trace"])
