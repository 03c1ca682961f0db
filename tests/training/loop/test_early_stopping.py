from __future__ import annotations

import math

from holdfast.training.configuration.schema import EarlyStoppingConfig
from holdfast.training.loop.early_stopping import EarlyStopping


def after(values: list[float], mode: str = "min", **config: float) -> tuple[EarlyStopping, bool]:
    settings = EarlyStoppingConfig.model_validate(config)
    state = EarlyStopping()
    for value in values:
        state = state.after(value, settings, "max" if mode == "max" else "min")
    return state, state.should_stop(settings)


def test_stops_when_patience_has_run_out_and_not_before() -> None:
    assert after([3.0, 2.0, 2.5], patience_epochs=2) == (EarlyStopping(2.0, 1), False)
    assert after([3.0, 2.0, 2.5, 2.0], patience_epochs=2) == (EarlyStopping(2.0, 2), True)


def test_never_stops_without_patience() -> None:
    assert not after([1.0, *[2.0] * 99])[1]


def test_larger_is_better_where_the_metric_is_maximised() -> None:
    assert after([0.5, 0.7, 0.6], "max", patience_epochs=1) == (EarlyStopping(0.7, 1), True)


def test_a_change_below_min_delta_is_no_improvement() -> None:
    assert after([1.0, 0.95], min_delta=0.1, patience_epochs=1)[1]


def test_nan_is_never_an_improvement() -> None:
    assert after([math.nan, math.nan], patience_epochs=2) == (EarlyStopping(None, 2), True)
