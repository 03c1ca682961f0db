from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.preemption.notices import (
    Notice,
    PreemptionMonitor,
    SignalSource,
    grace_warning,
    stop_decision,
)
from holdfast.training.preemption.signals import (
    SignalFlag,
    current_signal_flag,
    install_signal_flag,
)


@pytest.fixture
def flag() -> Iterator[SignalFlag]:
    yield install_signal_flag()
    current_signal_flag().uninstall()


def test_the_nearest_deadline_is_the_notice() -> None:
    monitor = PreemptionMonitor([])
    unknown, late, soon = (Notice("test", "r", deadline) for deadline in (None, 20.0, 10.0))
    for notice in (unknown, late, soon, late):
        monitor._deliver(notice)
    assert monitor.notice is soon
    assert monitor.notice is soon


def test_an_advance_notice_is_taken_once_and_is_no_notice() -> None:
    monitor = PreemptionMonitor([])
    advance = Notice("aws", "rebalance", None, is_advance=True)
    monitor._deliver(advance)
    assert monitor.notice is None
    assert monitor.take_advance() is advance
    assert monitor.take_advance() is None


def test_a_record_of_a_notice_holds_no_monotonic_time() -> None:
    assert Notice("gcp", "preempted", 130.0).as_record(now_s=100.0) == {
        "source": "gcp",
        "reason": "preempted",
        "is_advance": False,
        "remaining_s": 30.0,
    }


def test_polling_for_a_notice_costs_less_than_a_microsecond_or_two() -> None:
    monitor = PreemptionMonitor([])
    begin_s = time.perf_counter()
    for _ in range(10_000):
        assert monitor.notice is None
    assert time.perf_counter() - begin_s < 0.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_becomes_a_notice_at_once(flag: SignalFlag, number: signal.Signals) -> None:
    with PreemptionMonitor([SignalSource(25.0)]) as monitor:
        now_s = time.monotonic()
        os.kill(os.getpid(), number)
        notice = monitor.notice
    assert notice is not None
    assert (notice.source, notice.reason) == ("signal", number.name)
    assert notice.deadline_s == pytest.approx(now_s + 25.0, abs=1.0)


def test_a_signal_before_the_monitor_starts_is_heard(flag: SignalFlag) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert flag.first is not None
    time.sleep(0.05)
    with PreemptionMonitor([SignalSource(25.0)]) as monitor:
        assert monitor.notice is not None
        assert monitor.notice.deadline_s == flag.first.received_s + 25.0


def test_a_stopped_monitor_keeps_its_notice_and_hears_no_more(flag: SignalFlag) -> None:
    with PreemptionMonitor([SignalSource(25.0)]) as monitor:
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert monitor.notice is not None
    assert monitor.notice.reason == "SIGTERM"


def test_outside_the_main_thread_a_signal_source_warns_and_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = SignalSource(1.0)
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=source.start, args=([].append,))
        thread.start()
        thread.join()
    source.stop()
    assert "outside the main thread" in caplog.text


times = st.floats(0, 1e4)


@given(times, times, times, times)
def test_a_save_is_only_begun_when_step_and_save_fit(
    now_s: float, left_s: float, step_s: float, save_s: float
) -> None:
    notice = Notice("test", "r", now_s + left_s)
    decision = stop_decision(notice, now_s=now_s, step_s=step_s, save_s=save_s)
    if decision == "finish_and_save":
        assert step_s + save_s <= left_s + 1e-6
    else:
        assert step_s + 1.2 * save_s >= left_s - 1e-6


@given(times, times, times, times)
def test_more_time_never_turns_a_save_into_none(
    left_s: float, more_s: float, step_s: float, save_s: float
) -> None:
    def decide(seconds: float) -> str:
        return stop_decision(Notice("t", "r", seconds), now_s=0.0, step_s=step_s, save_s=save_s)

    if decide(left_s) == "finish_and_save":
        assert decide(left_s + more_s) == "finish_and_save"


def test_without_a_deadline_or_a_measurement_a_save_is_tried() -> None:
    assert stop_decision(Notice("t", "r", None), now_s=0.0, step_s=9.0, save_s=9.0) == (
        "finish_and_save"
    )
    soon = Notice("t", "r", 10.0)
    assert stop_decision(soon, now_s=0.0, step_s=9.0, save_s=None) == "finish_and_save"
    assert stop_decision(soon, now_s=2.0, step_s=9.0, save_s=None) == "trust_last_checkpoint"


def test_after_the_deadline_the_last_checkpoint_is_trusted() -> None:
    late = Notice("t", "r", 10.0)
    assert stop_decision(late, now_s=11.0, step_s=0.0, save_s=0.0) == "trust_last_checkpoint"


def test_a_grace_period_that_is_too_short_is_warned_about_with_all_figures() -> None:
    warning = grace_warning(grace_period_s=30.0, step_s=1.0, save_s=28.0)
    assert warning is not None
    assert "28.0 s" in warning
    assert "preemption.grace_period_s=30" in warning
    assert grace_warning(grace_period_s=30.0, step_s=1.0, save_s=10.0) is None
