"""The process in which a stage of the pipeline runs a script, as the script's run sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from holdfast.training.errors import InputError
from holdfast.training.own_loop.champion import HandedOver
from holdfast.training.runs.progress import Progress
from holdfast.training.runs.segment_log import SegmentLog


@dataclass
class Host:
    """Who runs a script in this process, and what the script has left there.

    Attributes:
        progress: where the run tells of itself.
        log: of the segment, which the host closes.
        is_training: the script is to train; else it is to come to ``run.champion`` alone.
        run: the ``Run`` that ``holdfast.run`` made, which knows this module.
        champion: what ``run.champion`` was given.
    """

    progress: Progress
    log: SegmentLog
    is_training: bool = False
    run: Any = None
    champion: HandedOver | None = None


class ChampionReachedError(BaseException):
    """The script has come to ``run.champion``, and need not go on. Never an error to it."""


_host: Host | None = None


def current_host() -> Host | None:
    """The host of this process; None where a script was started by itself."""
    return _host


def become_host(host: Host) -> None:
    """Run one script in this process. Raises InputError where one was run before."""
    global _host  # as the script's run itself: a process has one lease
    if _host is not None:
        raise InputError("a script was run in this process before: start another process")
    _host = host
