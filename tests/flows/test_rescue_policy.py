"""When a rescuer acts, and when it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.flows.fleet.rescue_policy import (
    EngineSighting,
    RescueSettings,
    Sighting,
    decide,
    rescue_message,
    rescued_steps,
    rescues_without_progress,
)
from holdfast.flows.fleet.rescue_watch import Watches

SETTINGS = RescueSettings()
ALIVE = EngineSighting("held", unchanged_s=4, ttl_s=20, is_run_written=True)


def action(seen: Sighting) -> str:
    return decide(seen, SETTINGS).action


def running(engine: EngineSighting | None = None, **values: float) -> Sighting:
    return Sighting("RUNNING", unchanged_s=1000, engine=engine, **values)  # type: ignore[arg-type]


def test_a_run_whose_engine_renews_its_lease_is_left_alone_without_any_heartbeat() -> None:
    assert action(running(ALIVE, heartbeat_unchanged_s=1000)) == "wait"


def test_an_engine_that_does_not_renew_is_dead_after_its_ttl() -> None:
    assert action(running(EngineSighting("held", 19, 20, is_run_written=False))) == "wait"
    assert action(running(EngineSighting("overdue", 21, 20, is_run_written=False))) == "crash"


def test_an_expired_lease_says_nothing_before_we_have_watched_it_ourselves() -> None:
    """The clock of another machine may be wrong by any amount."""
    assert action(running(EngineSighting("overdue", 0, 20, is_run_written=False))) == "wait"


def test_nobody_is_declared_dead_while_the_run_is_being_written() -> None:
    assert action(running(EngineSighting("gone", 500, 20, is_run_written=True))) == "wait"


def test_a_process_that_is_gone_is_dead_at_the_second_sight() -> None:
    assert action(running(EngineSighting("gone", 0, 20, is_run_written=False))) == "wait"
    assert action(running(EngineSighting("gone", 2, 20, is_run_written=False))) == "crash"


def test_an_engine_that_let_go_has_time_to_report_the_end() -> None:
    assert action(running(EngineSighting("released", 29, 20, is_run_written=False))) == "wait"
    assert action(running(EngineSighting("released", 31, 20, is_run_written=False))) == "crash"


def test_without_a_lease_the_heartbeat_decides() -> None:
    assert action(running(heartbeat_unchanged_s=74)) == "wait"
    assert action(running(heartbeat_unchanged_s=76)) == "crash"


def test_a_run_that_has_just_begun_is_given_time_for_its_first_heartbeat() -> None:
    seen = replace(running(heartbeat_unchanged_s=1000), unchanged_s=5)
    assert action(seen) == "wait"


def test_a_cancelled_run_whose_engine_is_dead_is_cancelled() -> None:
    dead = EngineSighting("overdue", 21, 20, is_run_written=False)
    assert action(Sighting("CANCELLING", 1000, engine=dead)) == "cancel"
    assert action(Sighting("CANCELLING", 1000, engine=ALIVE)) == "wait"


def test_a_run_that_is_pending_for_too_long_is_crashed() -> None:
    assert action(Sighting("PENDING", 119)) == "wait"
    assert action(Sighting("PENDING", 121)) == "crash"


def test_only_an_overdue_retry_within_a_process_is_crashed() -> None:
    assert action(Sighting("SCHEDULED", 1000)) == "wait"
    assert action(Sighting("SCHEDULED", 1000, is_in_process_retry=True)) == "crash"
    assert action(Sighting("SCHEDULED", 10, is_in_process_retry=True)) == "wait"


def test_a_crashed_run_is_started_again_at_once_then_after_pauses_that_double() -> None:
    def pause_is_over(age_s: float, num: int) -> bool:
        seen = Sighting("CRASHED", 0, crash_age_s=age_s, step=7, rescues=(7,) * num)
        return action(seen) == "retry"

    assert pause_is_over(0, 0)
    assert [pause_is_over(s, 1) for s in (4, 6)] == [False, True]
    assert [pause_is_over(s, 4) for s in (39, 41)] == [False, True]


def test_crashes_without_progress_end_and_crashes_with_progress_never_do() -> None:
    stuck = Sighting("CRASHED", 0, crash_age_s=1000, step=7, rescues=(7,) * 5)
    assert action(stuck) == "give_up"
    moving = replace(stuck, step=1000, rescues=tuple(range(0, 1000, 10)))
    assert action(moving) == "retry"


def test_runs_that_crashed_long_ago_are_left_alone() -> None:
    assert action(Sighting("CRASHED", 0, crash_age_s=25 * 3600)) == "wait"


def test_the_history_tells_of_each_rescue_once() -> None:
    twice = rescue_message(3, "by two rescuers at once")
    history = ["", twice, twice, "", "", rescue_message(None, "out of sight"), "lost: x"]
    assert rescued_steps(history) == (3, None)


@given(st.lists(st.integers(0, 5) | st.none(), max_size=9), st.integers(0, 5) | st.none())
def test_no_more_rescues_are_counted_than_there_were(
    steps: list[int | None], step: int | None
) -> None:
    assert 0 <= rescues_without_progress(steps, step) <= len(steps)


@pytest.mark.parametrize("num_looks", [1, 5])
def test_a_watch_measures_from_the_first_sight_and_begins_anew_after_a_gap(num_looks: int) -> None:
    watches = Watches()
    for look in range(num_looks):
        assert watches.unchanged_s(("run", "state"), "a", 10.0 + look) == look
    assert watches.unchanged_s(("run", "state"), "b", 30.0) == 0
    watches.forget()
    assert watches.unchanged_s(("run", "state"), "b", 90.0) == 0


def test_watches_of_runs_that_ended_are_dropped() -> None:
    watches = Watches()
    watches.unchanged_s(("ended", "state"), "a", 0.0)
    watches.unchanged_s(("lives", "state"), "a", 0.0)
    watches.keep_only({"lives"})
    assert watches.unchanged_s(("ended", "state"), "a", 9.0) == 0
    assert watches.unchanged_s(("lives", "state"), "a", 9.0) == 9
