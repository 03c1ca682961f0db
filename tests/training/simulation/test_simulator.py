"""The simulator against what one reckons by hand, and against itself step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.checkpointing.policy import SaveSchedule
from holdfast.training.configuration.schema import PricesConfig
from holdfast.training.errors import InputError
from holdfast.training.simulation.capacity import Machine
from holdfast.training.simulation.costs import RunCosts
from holdfast.training.simulation.simulator import Intervals, SaveTimes, fixed, online, simulate
from holdfast.training.simulation.study import exponential_starts, study

COSTS = RunCosts(
    num_steps=100,
    step_s=1.0,
    save_s=0.5,
    durable_s=1.0,
    start_s=5.0,
    takeover_s=20.0,
    handover_s=3.0,
)


@dataclass
class Lives:
    """Machines with these lives and notices, then one that stays."""

    lives: Sequence[tuple[float, float]]
    number: int = -1

    def next_machine(self, at_s: float) -> Machine:
        self.number += 1
        if self.number >= len(self.lives):
            return Machine(at_s, math.inf)
        life_s, notice_s = self.lives[self.number]
        return Machine(at_s, at_s + life_s, notice_s)


def test_a_calm_run_starts_works_and_saves_once() -> None:
    found = simulate(COSTS, Lives([]), fixed(math.inf))
    assert found is not None
    assert (found.useful_s, found.starting_s, found.saving_s) == (100, 5, 1)
    assert (found.total_s, found.num_segments) == (106, 1)
    assert found.recomputed_s == found.restarting_s == found.waiting_s == 0


def test_intervals_and_ends_of_epochs_are_paid_for() -> None:
    found = simulate(replace(COSTS, epoch_steps=30), Lives([]), fixed(10.0))
    assert found is not None
    # After 10, 20, 30 of each epoch; of the last, with 10 steps, at its end.
    assert found.saving_s == 10 * 0.5 + 0.5
    assert found.total_s == pytest.approx(5 + 100 + 5.5)


def test_a_machine_that_vanishes_costs_what_was_not_durable() -> None:
    # 5 s of start, 10 of work, a save that is durable at 16: killed just before, and just after.
    late = simulate(COSTS, Lives([(16.1, 0.0)]), fixed(10.0))
    early = simulate(COSTS, Lives([(15.9, 0.0)]), fixed(10.0))
    assert late is not None
    assert early is not None
    assert late.recomputed_s == pytest.approx(0.6)
    assert early.recomputed_s == pytest.approx(10.4)
    assert late.waiting_s == early.waiting_s == 20
    assert late.useful_s == early.useful_s == pytest.approx(100)


def test_a_notice_keeps_all_work_where_there_is_time_for_a_save() -> None:
    found = simulate(COSTS, Lives([(40.0, 10.0)]), fixed(math.inf))
    assert found is not None
    assert (found.recomputed_s, found.waiting_s, found.restarting_s) == (0, 3, 5)
    assert found.saving_s == 2  # the one at the notice, and the last
    short = simulate(COSTS, Lives([(40.0, 1.1)]), fixed(math.inf))
    assert short is not None
    assert short.recomputed_s == pytest.approx(40 - 5 - 1.1)


def test_a_machine_that_goes_before_the_first_step_costs_its_life() -> None:
    found = simulate(COSTS, Lives([(3.0, 0.0), (8.0, 7.0)]), fixed(math.inf))
    assert found is not None
    assert found.starting_s == 3
    assert found.restarting_s == 5 + 5
    assert found.num_segments == 3


def test_a_run_that_no_machine_outlives_never_ends() -> None:
    @dataclass(frozen=True)
    class Short:
        def next_machine(self, at_s: float) -> Machine:
            return Machine(at_s, at_s + 20.0)

    assert simulate(COSTS, Short(), fixed(math.inf)) is None
    assert simulate(COSTS, Short(), fixed(5.0)) is not None


def by_steps(costs: RunCosts, intervals: Intervals, start: int, wall_s: float) -> list[float]:
    """The same as ``SaveTimes.at``, one step of a second after the other."""
    done, saved, clock_s, interval_s, since = start, start, 0.0, intervals.first_s, 0
    epoch = costs.epoch_steps or costs.num_steps
    while done < costs.num_steps:
        if clock_s + 1 > wall_s:
            return [done + wall_s - clock_s, saved]
        clock_s, done, since = clock_s + 1, done + 1, since + 1
        if done % epoch == 0 or done == costs.num_steps or since >= interval_s:
            if clock_s + costs.save_s > wall_s:
                return [done, saved]
            clock_s, saved, since = clock_s + costs.save_s, done, 0
            interval_s = max(intervals.later_s, costs.durable_s)
    return [done, saved]


@given(
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(2, 9),
    st.integers(0, 9),
    st.floats(0.01, 15.0),
    st.sampled_from([None, 3, 4]),
)
def test_what_a_life_saves_is_what_single_steps_save(
    num_steps: int, first: int, later: int, start: int, wall_s: float, epoch: int | None
) -> None:
    costs = RunCosts(num_steps, 1.0, 0.25, 0.5, 1.0, epoch_steps=epoch)
    intervals = Intervals(float(first), float(later))
    start = min(start, num_steps - 1)
    done_s, saved_s, saving_s = SaveTimes(costs, intervals, float(start)).at(wall_s)
    assert [done_s, saved_s] == pytest.approx(by_steps(costs, intervals, start, wall_s))
    if done_s < costs.work_s:
        assert done_s - start + saving_s == pytest.approx(wall_s)


@given(st.integers(2, 40), st.integers(1, 9), st.floats(0.01, 500.0))
def test_whole_epochs_are_reckoned_at_once_as_step_by_step(
    num_steps: int, later: int, wall_s: float
) -> None:
    costs = RunCosts(10 * num_steps, 1.0, 0.25, 0.5, 1.0, epoch_steps=num_steps)
    intervals = Intervals(float(later), float(later))
    done_s, saved_s, _ = SaveTimes(costs, intervals, 0.0).at(wall_s)
    assert [done_s, saved_s] == pytest.approx(by_steps(costs, intervals, 0, wall_s))


def test_a_run_of_very_many_epochs_is_reckoned_at_once() -> None:
    costs = replace(COSTS, num_steps=10**12, epoch_steps=10)
    done_s, saved_s, saving_s = SaveTimes(costs, Intervals(5.0, 5.0), 3.0).at(1e13)
    assert done_s == saved_s == costs.work_s
    assert saving_s == 0.5 * 2e11


def test_nobody_waits_less_than_no_time() -> None:
    costs = replace(COSTS, step_s=0.0043, save_s=0.0017, durable_s=0.012, start_s=1.15)
    for start in exponential_starts(3600.0, 30.0, 0.2, 0, 20):
        found = simulate(costs, start(), fixed(math.inf))
        assert found is not None
        assert found.waiting_s == 0.0


def test_the_interval_of_training_comes_close_to_the_best_in_hindsight() -> None:
    costs = replace(COSTS, num_steps=100_000, step_s=0.5, save_s=0.1)
    for mean_s in (1800.0, 3600.0, 4 * 3600.0):
        for share in (0.0, 0.2, 1.0):
            starts = exponential_starts(mean_s, 30.0, share, 0, 3)
            schedule = SaveSchedule(is_auto=True)
            found = study(costs, starts, schedule, 3600.0, PricesConfig())
            assert 0.98 <= found.closeness <= 1.0, (mean_s, share)


def test_the_best_interval_without_a_notice_is_that_of_young() -> None:
    costs = replace(COSTS, num_steps=200_000, step_s=0.5, save_s=2.0, durable_s=2.0)
    starts = exponential_starts(3600.0, 0.0, 1.0, 0, 5)
    best_s = study(costs, starts, SaveSchedule(), 3600.0, PricesConfig()).best_interval_s
    assert 0.5 < best_s / math.sqrt(2 * 2.0 * 3600.0) < 2.0


def test_the_online_interval_learns_from_what_was_lived() -> None:
    rule = online(SaveSchedule(is_auto=True, max_overhead=1.0), COSTS, 3600.0)
    assert rule(0.0, 0).later_s == pytest.approx(math.sqrt(2 * 0.5 * 3600))
    assert rule(400.0, 9).later_s == pytest.approx(math.sqrt(2 * 0.5 * 400))
    assert rule(0.0, 0).first_s == pytest.approx(math.sqrt(2 * 1.0 * 3600))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, found 0"),
        ({"step_s": 0.0}, "step_s must be above 0"),
        ({"save_s": -1.0}, "save_s must be at least 0"),
        ({"start_s": math.nan}, "start_s must be at least 0"),
        ({"durable_s": 0.1}, "durable_s=0.1 is less than save_s=0.5"),
    ],
)
def test_costs_that_are_none_are_refused(changes: dict[str, float], told: str) -> None:
    with pytest.raises(InputError, match=told):
        replace(COSTS, **changes)  # type: ignore[arg-type]
