"""Notices that this machine goes away, and what to do about them.

A source tells the monitor; the trainer reads ``monitor.notice`` at each step boundary and between
evaluation batches, which costs an attribute. A notice has one type whatever its source. To add a
source, write a class with ``start`` and ``stop`` and a row in ``preemption.sources.SOURCES``.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from holdfast.training.preemption.signals import (
    ReceivedSignal,
    current_signal_flag,
    exec_held,
    hold_signals,
    ignore_in_worker,
    install_signal_flag,
    reclaim_signals,
    signals_held,
)

__all__ = [
    "Notice",
    "PreemptionMonitor",
    "PreemptionSource",
    "SignalSource",
    "StopDecision",
    "exec_held",
    "grace_warning",
    "hold_signals",
    "ignore_in_worker",
    "install_signal_flag",
    "reclaim_signals",
    "signals_held",
    "stop_decision",
]

logger = logging.getLogger(__name__)

SAVE_MARGIN = 1.2  # the last save of a machine that is being shut down is rarely the fastest
StopDecision = Literal["finish_and_save", "trust_last_checkpoint"]


@dataclass(frozen=True)
class Notice:
    """This machine goes away.

    Attributes:
        source: which source said so, as in ``preemption.sources``, or ``wall_time``.
        reason: what it said, for people.
        deadline_s: monotonic time at which the machine may end; None where nobody knows.
        is_advance: the machine may go away later: the next save is brought forward, that is all.
    """

    source: str
    reason: str
    deadline_s: float | None
    is_advance: bool = False

    def remaining_s(self, now_s: float) -> float | None:
        """Seconds until the deadline, never negative; None where there is no deadline."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - now_s)

    def as_record(self, now_s: float) -> dict[str, Any]:
        """What a segment record keeps: monotonic time means nothing to another process."""
        record = asdict(self)
        del record["deadline_s"]
        return {**record, "remaining_s": self.remaining_s(now_s)}


Deliver = Callable[[Notice], None]


class PreemptionSource(Protocol):
    """Something that knows when the machine goes away. It never disturbs training."""

    def start(self, deliver: Deliver) -> None:
        """Begin to listen; ``deliver`` may be called from any thread and from signal handlers."""
        ...

    def stop(self) -> None:
        """Stop listening. After return ``deliver`` is not called any more, save for an answer
        that is under way."""
        ...


class PreemptionMonitor:
    """All sources of a segment together. Nothing here waits or takes a lock."""

    def __init__(self, sources: Iterable[PreemptionSource]) -> None:
        self._sources = tuple(sources)
        self._advances: deque[Notice] = deque(maxlen=8)
        self._arrived: deque[Notice] = deque(maxlen=64)

    def start(self) -> None:
        """Start every source."""
        for source in self._sources:
            source.start(self._deliver)

    def stop(self) -> None:
        """Stop every source. The notice stays."""
        for source in self._sources:
            source.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def notice(self) -> Notice | None:
        """The notice with the nearest deadline, or None while the machine stays."""
        if not self._arrived:
            return None
        return min(tuple(self._arrived), key=_urgency)

    def own_notice(self) -> Notice | None:
        """The notice that this machine goes away, whatever other machines know of it."""
        return self.notice

    def take_advance(self) -> Notice | None:
        """An advance notice that was not taken yet: save soon, and go on."""
        return self._advances.popleft() if self._advances else None

    def _deliver(self, notice: Notice) -> None:
        (self._advances if notice.is_advance else self._arrived).append(notice)


class SignalSource:
    """SIGTERM, SIGINT or SIGUSR1, from whoever manages this machine."""

    def __init__(self, grace_period_s: float) -> None:
        self._grace_period_s = grace_period_s
        self._deliver: Deliver | None = None

    def start(self, deliver: Deliver) -> None:
        """Deliver a notice for each signal, also for those that came since the flag is up."""
        self._deliver = deliver
        try:
            install_signal_flag()
        except ValueError:
            if not current_signal_flag().is_installed:
                logger.warning(
                    "signals cannot be taken over outside the main thread; call "
                    "install_signal_flag() there first, or SIGTERM ends this process unsaved"
                )
        current_signal_flag().listen(self._on_signal)

    def stop(self) -> None:
        """Leave the flag up, so that a late signal does not end a process that is saving."""
        current_signal_flag().leave(self._on_signal)

    def _on_signal(self, received: ReceivedSignal) -> None:
        if self._deliver is not None:
            deadline_s = received.received_s + self._grace_period_s
            self._deliver(Notice("signal", received.name, deadline_s))


def stop_decision(
    notice: Notice, *, now_s: float, step_s: float, save_s: float | None
) -> StopDecision:
    """What to do about a notice.

    Args:
        notice: not an advance one.
        now_s: monotonic time.
        step_s: what is left of the current step; 0 at a step boundary.
        save_s: measured time from a save's start until it is durable; None while unknown.

    Returns:
        ``finish_and_save`` if the deadline leaves time for the step and a save, or nobody knows;
        otherwise ``trust_last_checkpoint``: stop without a save.
    """
    assert not notice.is_advance
    remaining_s = notice.remaining_s(now_s)
    if remaining_s is None or (save_s is None and remaining_s > step_s):
        return "finish_and_save"
    needed_s = step_s + SAVE_MARGIN * (save_s or 0.0)
    return "finish_and_save" if needed_s < remaining_s else "trust_last_checkpoint"


def grace_warning(*, grace_period_s: float, step_s: float, save_s: float) -> str | None:
    """A warning for the start of a run whose grace period is too short; None if it is enough."""
    needed_s = step_s + SAVE_MARGIN * save_s
    if needed_s < grace_period_s:
        return None
    return (
        f"a step takes {step_s:.1f} s and a save {save_s:.1f} s, together more than the "
        f"preemption.grace_period_s={grace_period_s:g} allows: a notice will cost the work since "
        f"the last checkpoint; save more often, or ask for a longer grace period"
    )


def monotonic_time(unix_s: float) -> float:
    """Monotonic time of a moment that was given as Unix time."""
    return time.monotonic() + (unix_s - time.time())


def _urgency(notice: Notice) -> float:
    return float("inf") if notice.deadline_s is None else notice.deadline_s
