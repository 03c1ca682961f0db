"""What the time of a run cost, where prices are configured. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.training.configuration.schema import PricesConfig
from holdfast.training.runs.ledger import Ledger

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Money:
    """Amounts in ``currency``.

    Attributes:
        paid: for all time in which a segment lived.
        useful: the part of it that went into steps that count, and validation.
        on_demand: what the same run costs where nothing stops it; None without that price.
    """

    paid: float
    useful: float
    on_demand: float | None
    currency: str

    @property
    def saved(self) -> float | None:
        """Against on demand; negative where the machines that went away were dearer."""
        return None if self.on_demand is None else self.on_demand - self.paid

    def told(self) -> str:
        """One line."""
        words = f"{self._amount(self.paid)} paid, {self._amount(self.useful)} of it for useful time"
        if self.on_demand is None or self.saved is None:
            return words
        share = abs(self.saved) / self.on_demand if self.on_demand > 0 else 0.0
        amount = f"{self._amount(abs(self.saved))} ({share:.0%})"
        change = f"saved {amount}" if self.saved >= 0 else f"lost {amount}"
        return f"{words}; {change} against {self._amount(self.on_demand)} on demand"

    def as_json(self) -> dict[str, float | str | None]:
        """For programs."""
        return {
            "currency": self.currency,
            "paid": self.paid,
            "useful": self.useful,
            "on_demand": self.on_demand,
            "saved": self.saved,
        }

    def _amount(self, value: float) -> str:
        return f"{value:,.2f} {self.currency}" if value >= 1 else f"{value:.4f} {self.currency}"


def money_of(ledger: Ledger, prices: PricesConfig) -> Money | None:
    """What a ledger cost; None where no price is configured.

    On demand there are no restarts, no steps done again and no waiting; saves and the start stay.
    """
    if prices.spot_per_hour is None:
        return None
    calm_s = ledger.useful_s + ledger.saving_s + ledger.starting_s
    on_demand = prices.on_demand_per_hour
    return Money(
        paid=ledger.paid_s / SECONDS_PER_HOUR * prices.spot_per_hour,
        useful=ledger.useful_s / SECONDS_PER_HOUR * prices.spot_per_hour,
        on_demand=None if on_demand is None else calm_s / SECONDS_PER_HOUR * on_demand,
        currency=prices.currency,
    )
