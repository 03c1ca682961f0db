"""What to do about a flow run, decided from what was seen of it. Pure; imports no Prefect.

Every age here is how long the rescuer itself has watched something not change, by its own clock
and without a gap: no clocks of different machines are compared, and after a time in which the
server or the rescuer was away every watch begins anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

RESCUE_PREFIX = "rescued"
RESCUE_MESSAGE = re.compile(rf"{RESCUE_PREFIX} at step (\d+|\?)")
MAX_PAUSE_S = 600.0

EngineStatus = Literal["held", "released", "gone", "overdue"]


@dataclass(frozen=True)
class RescueSettings:
    """When a rescuer does what.

    Attributes:
        tag: it looks after flow runs with this tag.
        every_s: between two looks.
        heartbeat_s: Prefect's heartbeat, every 30 s, is missed after this long.
        released_s: an engine that let go of its run reports the end within this time.
        pending_s: a run that a worker took up is running within this time.
        retry_delay_s: pause before a run is started again that has crashed a second time without
            progress, doubled from then on. There is none before the first time.
        max_rescues: without progress in between.
        max_crash_age_s: crashed runs that are older are left alone.
        gap_s: a look that comes so much too late is a gap, after which every watch begins anew. It
            is shorter than a lease, so that a machine that slept takes nobody for dead.
    """

    tag: str = "holdfast"
    every_s: float = 1.0
    heartbeat_s: float = 75.0
    released_s: float = 30.0
    pending_s: float = 120.0
    retry_delay_s: float = 5.0
    max_rescues: int = 5
    max_crash_age_s: float = 24 * 3600.0
    gap_s: float = 4.0


@dataclass(frozen=True)
class EngineSighting:
    """The engine's lease of the attempt that is running.

    Attributes:
        status: ``gone`` where its process was seen to be gone.
        unchanged_s: how long it was not renewed while we watched.
        ttl_s: after which it counts as dead.
        is_run_written: the run's own lease is being renewed: somebody trains.
    """

    status: EngineStatus
    unchanged_s: float
    ttl_s: float
    is_run_written: bool


@dataclass(frozen=True)
class Sighting:
    """A flow run, as it is seen now.

    Attributes:
        state: its type: RUNNING, PENDING, CANCELLING, SCHEDULED or CRASHED.
        is_in_process_retry: it waits for a retry within a process.
        unchanged_s: how long its state did not change while we watched.
        heartbeat_unchanged_s: how long no new heartbeat came while we watched.
        engine: its engine's lease; None where it has none yet, or the store is out of sight.
        crash_age_s: seconds since it crashed, by the server's records.
        step: newest checkpoint; None where the store is out of sight.
        rescues: step of each time that it was rescued before, the oldest first.
    """

    state: str
    unchanged_s: float
    is_in_process_retry: bool = False
    heartbeat_unchanged_s: float = 0.0
    engine: EngineSighting | None = None
    crash_age_s: float = 0.0
    step: int | None = None
    rescues: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What to do, and why.

    Attributes:
        action: ``crash``: mark as Crashed; ``cancel``: mark as Cancelled; ``retry``: start again
            after ``pause_s``; ``give_up``: leave it crashed; ``wait``: nothing yet.
    """

    action: Literal["wait", "crash", "cancel", "retry", "give_up"]
    reason: str = ""
    pause_s: float = 0.0


WAIT = Verdict("wait")


def decide(seen: Sighting, settings: RescueSettings) -> Verdict:
    """What to do about a flow run."""
    if seen.state == "CRASHED":
        return _about_crashed(seen, settings)
    if seen.state == "RUNNING":
        reason = why_dead(seen, settings)
        return Verdict("crash", reason) if reason else WAIT
    if seen.state == "CANCELLING":
        reason = why_dead(seen, settings)
        return Verdict("cancel", reason) if reason else WAIT
    if seen.state == "PENDING" and seen.unchanged_s > settings.pending_s:
        return Verdict("crash", f"its worker did not start it within {seen.unchanged_s:.0f} s")
    if seen.is_in_process_retry and seen.unchanged_s > settings.heartbeat_s:
        return Verdict("crash", "its process is gone, which alone could have retried it")
    return WAIT


def why_dead(seen: Sighting, settings: RescueSettings) -> str | None:
    """Why a running flow run's engine is taken for dead; None while it may live."""
    engine = seen.engine
    if engine is None:
        silent_s = min(seen.unchanged_s, seen.heartbeat_unchanged_s)
        is_silent = silent_s > settings.heartbeat_s
        return f"no heartbeat for {silent_s:.0f} s" if is_silent else None
    if engine.is_run_written:
        return None
    if engine.status == "gone" and engine.unchanged_s > 0:
        return "its engine's process is gone"
    if engine.status == "released":
        is_late = engine.unchanged_s > settings.released_s
        return "its engine left without a word" if is_late else None
    is_overdue = engine.unchanged_s > engine.ttl_s
    return (
        f"its engine's lease was not renewed for {engine.unchanged_s:.0f} s" if is_overdue else None
    )


def rescued_steps(messages: Iterable[str]) -> tuple[int | None, ...]:
    """The step of each rescue in a flow run's history.

    Args:
        messages: of each state, the oldest first. What several rescuers wrote
            at once, with no other state in between, counts once.
    """
    steps: list[int | None] = []
    was_rescue = False
    for message in messages:
        found = RESCUE_MESSAGE.match(message)
        if found is not None and not was_rescue:
            steps.append(None if found[1] == "?" else int(found[1]))
        was_rescue = found is not None
    return tuple(steps)


def rescue_message(step: int | None, reason: str) -> str:
    """What ``rescued_steps`` reads again."""
    return f"{RESCUE_PREFIX} at step {'?' if step is None else step}: {reason}"


def rescues_without_progress(rescues: Sequence[int | None], step: int | None) -> int:
    """How many rescues, counted from the last one, have brought no newer checkpoint."""
    num = 0
    for rescued in reversed(rescues):
        if rescued is not None and step is not None and rescued < step:
            break
        num += 1
    return num


def _about_crashed(seen: Sighting, settings: RescueSettings) -> Verdict:
    if seen.crash_age_s > settings.max_crash_age_s:
        return WAIT
    num = rescues_without_progress(seen.rescues, seen.step)
    if num >= settings.max_rescues:
        return Verdict("give_up", f"started again {num} times without a new checkpoint")
    pause_s = min(MAX_PAUSE_S, settings.retry_delay_s * 2 ** (num - 1)) if num else 0.0
    if max(seen.crash_age_s, seen.unchanged_s) < pause_s:
        return WAIT
    return Verdict("retry", f"attempt {num + 1} of {settings.max_rescues} without progress")
