"""Sources of notices as a segment watches them, and waiting for what they tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.training.configuration.schema import PreemptionConfig
from holdfast.training.preemption.notices import Notice, PreemptionMonitor
from holdfast.training.preemption.signals import current_signal_flag
from holdfast.training.preemption.sources import build_sources

WAIT_S = 10.0


def config(name: str, **changes: object) -> PreemptionConfig:
    sources = () if name == "wall_time" else (name,)
    usual: dict[str, object] = {"sources": sources, "poll_interval_s": 0.02, "grace_period_s": 30.0}
    return PreemptionConfig.model_validate({**usual, **changes})


@contextmanager
def monitoring(settings: PreemptionConfig) -> Iterator[PreemptionMonitor]:
    try:
        with PreemptionMonitor(build_sources(settings)) as monitor:
            yield monitor
    finally:
        current_signal_flag().uninstall()


def eventually(ask: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not ask():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


def notice_of(monitor: PreemptionMonitor) -> Notice:
    eventually(lambda: monitor.notice)
    assert monitor.notice is not None
    return monitor.notice
