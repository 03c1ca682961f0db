"""Intervals: what is drawn, what they say, and that a program that draws again gets the same."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.training.champion.bootstrap import Interval, interval, resampled_metrics, units_of
from holdfast.training.errors import ExperimentError, SelectionError
from holdfast.training.experiment.protocol import Context, Records
from holdfast.training.experiments.digits import Digits, DigitsSettings
from holdfast.training.experiments.turbofan.experiment import Turbofan, TurbofanSettings
from tests.faults.hard_experiment import Hard, HardSettings


class Mean:
    """The mean of ``loss``, and the number of engines as a metric sees them."""

    resampling_unit: ClassVar[str | None] = None

    def metrics(self, records: Records) -> dict[str, float]:
        engines = len(np.unique(records["engine"])) if "engine" in records else 0
        return {"loss": float(records["loss"].mean()), "engines": float(engines)}


class MeanByEngine(Mean):
    resampling_unit: ClassVar[str | None] = "engine"


def resampled(experiment: Any, *records: Records, num: int = 500, seed: int = 3) -> Any:
    return resampled_metrics(experiment, records, num_resamples=num, seed=seed)


def normal(num: int, seed: int) -> Records:
    return {"loss": np.random.RandomState(seed).standard_normal(num)}


def test_the_spread_of_a_mean_is_that_of_theory() -> None:
    records = normal(400, seed=1)
    (found,) = resampled(Mean(), records, num=4000)
    wanted = records["loss"].std() / 400**0.5
    assert found["loss"].std() == pytest.approx(wanted, rel=0.05)
    limits = interval(float(records["loss"].mean()), found["loss"])
    assert limits.value is not None
    assert limits.low == pytest.approx(limits.value - 1.96 * wanted, abs=0.1 * wanted)
    assert limits.high == pytest.approx(limits.value + 1.96 * wanted, abs=0.1 * wanted)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        (found,) = resampled(Mean(), normal(60, seed), num=200, seed=seed)
        limits = interval(0.0, found["loss"])
        assert limits.low is not None
        assert limits.high is not None
        covered += limits.low <= 0 <= limits.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_pair_is_compared_on_the_same_draws() -> None:
    one = normal(50, seed=1)
    better = {"loss": one["loss"] - 0.01}
    first, second = resampled(Mean(), one, better)
    # Far inside of the spread of either, and yet certain: the difference is the same in each draw.
    assert (first["loss"] - second["loss"]) == pytest.approx(0.01)
    assert interval(0.01, first["loss"] - second["loss"]).excludes_zero
    assert not interval(0.0, first["loss"]).excludes_zero


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    records = normal(30, seed=1)
    one, again, other = (resampled(Mean(), records, seed=seed)[0]["loss"] for seed in (3, 3, 4))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(0, 2**63 - 1))
def test_engines_are_drawn_whole_and_a_copy_counts_as_another(
    engines: list[int], seed: int
) -> None:
    engine = np.array(engines)
    records = {"loss": np.arange(len(engines)) * 1.0, "engine": engine}
    units = units_of(MeanByEngine(), records)  # type: ignore[arg-type]
    assert len(units) == len(set(engines))
    for chosen, number in units.draws(5, seed):
        assert sorted(set(number.tolist())) == list(range(len(units)))
        for unit in range(len(units)):
            members = chosen[number == unit]
            (which,) = set(engine[members].tolist())
            assert sorted(members.tolist()) == np.flatnonzero(engine == which).tolist()
    (found,) = resampled(MeanByEngine(), records, num=5, seed=seed)
    assert found["engines"].tolist() == [len(units)] * 5


def test_windows_of_one_engine_make_a_wider_interval_than_as_many_independent_ones() -> None:
    level = np.repeat(np.random.RandomState(0).standard_normal(20), 30)
    records = {"loss": level, "engine": np.repeat(np.arange(20), 30)}
    (by_sample,), (by_engine,) = resampled(Mean(), records), resampled(MeanByEngine(), records)
    assert by_engine["loss"].std() > 3 * by_sample["loss"].std()


def test_a_unit_that_is_no_record_is_refused_by_name() -> None:
    with pytest.raises(ExperimentError, match=r"resampling_unit = 'engine'.*'loss': \[5\]"):
        resampled(MeanByEngine(), normal(5, seed=0))
    with pytest.raises(ExperimentError, match=r"one value per sample"):
        resampled(MeanByEngine(), {**normal(5, seed=0), "engine": np.zeros((5, 2))})
    with pytest.raises(SelectionError, match="no samples"):
        resampled(Mean(), {"loss": np.empty(0)})


def test_limits_that_are_not_finite_are_none() -> None:
    assert interval(1.0, np.array([1.0, np.nan])) == Interval(1.0, None, None)
    assert interval(np.inf, np.array([1.0, 1.0])) == Interval(None, 1.0, 1.0)
    assert not interval(1.0, np.array([1.0, np.nan])).excludes_zero


def test_it_stops_when_a_notice_comes() -> None:
    answers = iter([False, False, True])
    found = resampled_metrics(
        Hard(Context(settings=HardSettings())),
        [{"loss": np.ones(3), "is_correct": np.ones(3)}],
        num_resamples=100,
        seed=0,
        should_stop=lambda: next(answers),
    )
    assert found is None


def records_of(num: int, num_classes: int, **others: Any) -> Records:
    random = np.random.RandomState(0)
    return {
        "loss": random.random_sample(num).astype(np.float32),
        "prediction": random.random_sample((num, num_classes)).astype(np.float32),
        **others,
    }


def test_a_thousand_paired_resamples_take_less_than_two_seconds() -> None:
    digits = records_of(360, 10, correct=np.ones(360, dtype=np.float32), target=np.arange(360) % 10)
    engine = records_of(
        259,
        3,
        health=np.ones((259, 3), dtype=np.float32),
        health_target=np.zeros(259, dtype=np.int64),
        engine=np.arange(259),
        target=np.arange(259, dtype=np.float32),
        cycle=np.arange(259),
    )
    engine["prediction"] = engine["prediction"][:, 0]
    cases: list[tuple[Any, Records]] = [
        (Digits(Context(settings=DigitsSettings())), digits),
        (Turbofan(Context(settings=TurbofanSettings())), engine),
    ]
    for experiment, records in cases:
        start_s = time.process_time()
        resampled(experiment, records, records, num=1000)
        assert time.process_time() - start_s < 2.0


def test_nasas_sum_over_engines_keeps_its_size_when_engines_are_drawn_twice() -> None:
    # Each engine's penalty is that of ten cycles too late, so every resample has the same sum.
    num = 50
    records = {
        "loss": np.zeros(num),
        "prediction": np.full(num, 60.0),
        "target": np.full(num, 50.0),
        "health": np.ones((num, 3)),
        "health_target": np.zeros(num),
        "engine": np.arange(num),
    }
    (found,) = resampled(Turbofan(Context(settings=TurbofanSettings())), records, num=20)
    assert found["nasa_score"] == pytest.approx(num * np.expm1(1.0))
