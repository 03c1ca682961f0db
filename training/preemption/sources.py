"""The sources of notices, and the table that builds them from the configuration."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.training.errors import ConfigError
from holdfast.training.preemption.cloud_notices import AwsQuestion, AzureQuestion, GcpQuestion
from holdfast.training.preemption.notices import (
    Deliver,
    Notice,
    PreemptionSource,
    SignalSource,
    monotonic_time,
)

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import PreemptionConfig

logger = logging.getLogger(__name__)

SLURM_END_VARIABLE = "SLURM_JOB_END_TIME"
MAX_BACKOFF_FACTOR = 10
MAX_CLOCK_POLL_S = 1.0
MAX_REASON_CHARS = 200

Question = Callable[[], Sequence[Notice]]


class PollingSource:
    """Asks a question again and again in a thread of its own, until a notice is final.

    A question that raises OSError is asked more and more rarely, up to ten times the interval;
    the first failure in a row is logged, and so is the end of it.
    """

    def __init__(self, name: str, question: Question, interval_s: float) -> None:
        self._name = name
        self._question = question
        self._interval_s = interval_s
        self._is_failing = False
        self._should_stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, deliver: Deliver) -> None:
        """Begin to ask at once."""
        self._thread = threading.Thread(
            target=self._ask_until_final,
            args=(deliver,),
            name=f"holdfast-{self._name}",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """Ask no more. Does not wait for an answer that is under way: the thread is a daemon."""
        self._should_stop.set()

    def _ask_until_final(self, deliver: Deliver) -> None:
        delivered: set[tuple[str, bool]] = set()
        wait_s = self._interval_s
        while not self._should_stop.is_set():
            notices = self._ask()
            for notice in notices or ():
                key = (notice.reason, notice.is_advance)
                if key not in delivered and not self._should_stop.is_set():
                    delivered.add(key)
                    deliver(notice)
                if not notice.is_advance:
                    return
            wait_s = self._interval_s if notices is not None else wait_s * 2
            self._should_stop.wait(min(wait_s, self._interval_s * MAX_BACKOFF_FACTOR))

    def _ask(self) -> Sequence[Notice] | None:
        """The answer; None where there was none."""
        try:
            notices = self._question()
        except OSError as error:
            if not self._is_failing:
                logger.warning("no answer about preemption from %s: %s", self._name, error)
            self._is_failing = True
            return None
        if self._is_failing:
            logger.info("%s answers again", self._name)
        self._is_failing = False
        return notices


class EndTimeQuestion:
    """Whether a known end has come near. Asks the clock each time: a machine may have slept."""

    def __init__(self, source: str, reason: str, *, notice_s: float, deadline_s: float) -> None:
        """Both times are monotonic: when to give notice, and what the notice's deadline is."""
        self._notice_s = notice_s
        self._notice = Notice(source, reason, deadline_s)

    def __call__(self) -> Sequence[Notice]:
        """The notice, once its time has come."""
        return [self._notice] if time.monotonic() >= self._notice_s else []


class SentinelQuestion:
    """Whether a file has appeared, as a container's preStop hook writes it.

    The machine ends a grace period after the file was written. One that is older than that when
    the segment starts is a left-over of an earlier life and is ignored.
    """

    def __init__(self, file: Path, grace_period_s: float) -> None:
        self._file = file
        self._grace_period_s = grace_period_s
        self._stale_mtime = self._find_stale()

    def __call__(self) -> Sequence[Notice]:
        """The notice, once the file is there."""
        try:
            written_at = self._file.stat().st_mtime
        except FileNotFoundError:
            return []
        if written_at == self._stale_mtime:
            return []
        reason = f"{self._file}: {self._first_line()}".removesuffix(": ")
        deadline_s = monotonic_time(written_at) + self._grace_period_s
        return [Notice("sentinel", reason, deadline_s)]

    def _find_stale(self) -> float | None:
        try:
            written_at = self._file.stat().st_mtime
        except OSError:
            return None
        if time.time() - written_at <= self._grace_period_s:
            return None
        logger.warning(
            "%s was written longer than preemption.grace_period_s=%g ago, before this segment: "
            "it is ignored until it is written again",
            self._file,
            self._grace_period_s,
        )
        return written_at

    def _first_line(self) -> str:
        try:
            with self._file.open(encoding="utf-8", errors="replace") as file:
                return file.readline(MAX_REASON_CHARS).strip()
        except OSError:
            return ""


def _signal(config: PreemptionConfig) -> list[PreemptionSource]:
    return [SignalSource(config.grace_period_s)]


def _slurm(config: PreemptionConfig) -> list[PreemptionSource]:
    return slurm_sources(config, os.environ)


def slurm_sources(
    config: PreemptionConfig, environment: Mapping[str, str]
) -> list[PreemptionSource]:
    """Notice a grace period before the job's end; nothing outside a SLURM job.

    Raises ConfigError where SLURM's variable is not a Unix time.
    """
    text = environment.get(SLURM_END_VARIABLE, "")
    if not text:
        return []
    if not text.isdecimal():
        raise ConfigError(
            f"{SLURM_END_VARIABLE}={text!r} is not a Unix time; unset it, or leave 'slurm' out of "
            f"preemption.sources"
        )
    deadline_s = monotonic_time(float(text))
    question = EndTimeQuestion(
        "slurm",
        f"the SLURM job ends at Unix time {text}",
        notice_s=deadline_s - config.grace_period_s,
        deadline_s=deadline_s,
    )
    return [PollingSource("slurm", question, MAX_CLOCK_POLL_S)]


def _wall_time(config: PreemptionConfig) -> list[PreemptionSource]:
    if config.max_wall_time_s is None:
        return []
    notice_s = time.monotonic() + config.max_wall_time_s
    question = EndTimeQuestion(
        "wall_time",
        f"preemption.max_wall_time_s={config.max_wall_time_s:g} has passed",
        notice_s=notice_s,
        deadline_s=notice_s + config.grace_period_s,
    )
    return [PollingSource("wall_time", question, min(MAX_CLOCK_POLL_S, config.max_wall_time_s))]


def _sentinel(config: PreemptionConfig) -> list[PreemptionSource]:
    if config.sentinel_file is None:
        raise ConfigError(
            "preemption.sources has 'sentinel' but preemption.sentinel_file is not set: name the "
            "file that the preStop hook writes"
        )
    question = SentinelQuestion(config.sentinel_file, config.grace_period_s)
    interval_s = min(MAX_CLOCK_POLL_S, config.poll_interval_s)
    return [PollingSource("sentinel", question, interval_s)]


def _aws(config: PreemptionConfig) -> list[PreemptionSource]:
    question = AwsQuestion(config.metadata_url, config.grace_period_s)
    return [PollingSource("aws", question, config.poll_interval_s)]


def _gcp(config: PreemptionConfig) -> list[PreemptionSource]:
    question = GcpQuestion(config.metadata_url, config.grace_period_s)
    return [PollingSource("gcp", question, config.poll_interval_s)]


def _azure(config: PreemptionConfig) -> list[PreemptionSource]:
    question = AzureQuestion(config.metadata_url, config.grace_period_s)
    return [PollingSource("azure", question, config.poll_interval_s)]


SOURCES: Mapping[str, Callable[[PreemptionConfig], list[PreemptionSource]]] = {
    "signal": _signal,
    "slurm": _slurm,
    "sentinel": _sentinel,
    "aws": _aws,
    "gcp": _gcp,
    "azure": _azure,
    "wall_time": _wall_time,
}


def build_sources(config: PreemptionConfig) -> list[PreemptionSource]:
    """The sources that a configuration asks for.

    A wall-time budget or a sentinel file that is set is listened to without being named in
    ``sources``. The budget begins with this call. Raises ConfigError.
    """
    names = [*config.sources, "wall_time"]
    if config.sentinel_file is not None:
        names.append("sentinel")
    return [source for name in dict.fromkeys(names) for source in SOURCES[name](config)]
