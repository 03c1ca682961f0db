"""What a ledger cost."""

from __future__ import annotations

import pytest

from holdfast.training.configuration.schema import PricesConfig
from holdfast.training.runs.ledger import Ledger
from holdfast.training.simulation.money import money_of

SPENT = Ledger(
    useful_s=3000.0,
    recomputed_s=300.0,
    saving_s=60.0,
    starting_s=40.0,
    restarting_s=200.0,
    waiting_s=9999.0,
    num_segments=3,
    num_recomputed_steps=7,
)


def test_without_a_price_there_is_no_money() -> None:
    assert money_of(SPENT, PricesConfig()) is None


def test_what_nobody_lived_through_is_not_paid_for() -> None:
    found = money_of(SPENT, PricesConfig(spot_per_hour=2.0))
    assert found is not None
    assert found.paid == pytest.approx(2.0)
    assert found.useful == pytest.approx(2.0 * 3000 / 3600)
    assert found.saved is None
    assert found.told() == "2.00 USD paid, 1.67 USD of it for useful time"


@pytest.mark.parametrize(
    ("on_demand", "words"),
    [
        (6.0, "saved 3.17 EUR (61%) against 5.17 EUR on demand"),
        (1.0, "lost 1.14 EUR (132%) against 0.8611 EUR on demand"),
    ],
)
def test_against_on_demand_there_are_no_restarts(on_demand: float, words: str) -> None:
    prices = PricesConfig(spot_per_hour=2.0, on_demand_per_hour=on_demand, currency="EUR")
    found = money_of(SPENT, prices)
    assert found is not None
    assert found.on_demand == pytest.approx(on_demand * 3100 / 3600)
    assert found.told().endswith(words)
