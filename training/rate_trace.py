"""The learning rates of a run, in little space."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_RATES = 256


@dataclass
class RateTrace:
    """The rates of steps 0, ``every``, 2 ``every`` and so on.

    Each time that there are more than MAX_RATES, every second one is dropped. What is kept depends
    on the step alone, so a run that was interrupted keeps what one without interruptions keeps.
    """

    every: int = 1
    rates: list[float] = field(default_factory=list)

    def record(self, step: int, rate: float) -> None:
        """Take the rate of a step (from 0); all steps in order, the newest may be taken again."""
        if step % self.every:
            return
        self.rates[step // self.every :] = [rate]
        if len(self.rates) > MAX_RATES:
            self.rates = self.rates[::2]
            self.every *= 2

    def points(self) -> list[tuple[int, float]]:
        """Steps and their rates."""
        return [(self.every * place, rate) for place, rate in enumerate(self.rates)]
