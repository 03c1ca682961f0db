"""Where the events of a stage go: the flow run's log, its progress artifact, and a terminal.

Nothing here may disturb training: the API is asked from a thread of its own, which may wait for a
server that is down as long as it likes, and errors of it are logged, not raised.
"""

from __future__ import annotations

import contextvars
import json
import os
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from holdfast.tasks.job import Job
from holdfast.tasks.news import tell_of_promotion

Event = dict[str, Any]
EVENTS_FD_VARIABLE = "HOLDFAST_EVENTS_FD"
ARTIFACT_INTERVAL_S = 5.0


class Reporter:
    """Takes the events and log lines of one run's stages.

    Use as a context manager inside a flow run: the thread that updates the progress artifact ends
    with it.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._logger = get_run_logger()
        self._artifact = _ProgressArtifact(self._logger.warning)

    def event(self, event: Event) -> None:
        """Take one event of a stage."""
        tell_terminal(event)
        kind = event.get("event")
        if kind in ("progress", "rehearsing"):
            self._artifact.offer(event)
            return
        if kind == "promotion":
            tell_of_promotion(f"{self._job.run.path.parent.name}/{self._job.run_id}", event)
        values = " ".join(f"{k}={_short(v)}" for k, v in event.items() if k != "event")
        self._logger.info("%s %s", kind, values)

    def log(self, line: str) -> None:
        """Take one line of a stage's log."""
        self._logger.info(line)

    def warn(self, message: str) -> None:
        """Tell what a person should know."""
        tell_terminal({"event": "log", "level": "warning", "message": message})
        self._logger.warning(message)

    def __enter__(self) -> Reporter:
        self._artifact.start()
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if exception_type is None:
            self._artifact.offer({"done": 1, "total": 1, "message": "finished"})
        self._artifact.stop()


def tell_terminal(event: Event) -> None:
    """Write an event for the command line that started this process, if one did.

    The command line may be gone: then nobody is told, and the run goes on.
    """
    descriptor = os.environ.get(EVENTS_FD_VARIABLE)
    if descriptor is None:
        return
    try:
        os.write(int(descriptor), (json.dumps(event) + "\n").encode())
    except OSError:
        os.environ.pop(EVENTS_FD_VARIABLE, None)


class _ProgressArtifact:
    """The newest progress, told to the API every few seconds by a thread."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._latest: Event | None = None
        self._is_stopping = threading.Event()
        self._artifact_id: UUID | None = None
        context = contextvars.copy_context()  # the flow run that artifacts belong to
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name="progress-artifact", daemon=True
        )

    def offer(self, event: Event) -> None:
        self._latest = event

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end; it is not waited for, since the server may be down."""
        self._is_stopping.set()

    def _work(self) -> None:
        shown: Event | None = None
        is_last = False
        while not is_last:
            is_last = self._is_stopping.wait(ARTIFACT_INTERVAL_S if shown else 0.5)
            event = self._latest
            if event is None or event is shown:
                continue
            shown = event
            try:
                self._show(event)
            except Exception as error:  # noqa: BLE001 - a thread of its own: told, not raised
                self._warn(f"the progress artifact was not updated: {error}")

    def _show(self, event: Event) -> None:
        percent = percent_of(event)
        if percent is None:
            return
        if self._artifact_id is None:
            created: Any = create_progress_artifact(
                progress=percent, key="training-progress", description=_describe(event)
            )
            self._artifact_id = created
        else:
            update_progress_artifact(
                self._artifact_id, progress=percent, description=_describe(event)
            )


def percent_of(event: Event) -> float | None:
    """How much of its stage a progress event says is done; None where it doesn't tell."""
    done = event.get("step", event.get("done"))
    total = event.get("num_steps", event.get("total"))
    if done is None or not total:
        return None
    return round(min(100.0, 100.0 * float(done) / float(total)), 1)


def _describe(event: Event) -> str:
    return ", ".join(f"{k} {_short(v)}" for k, v in event.items() if k != "event")


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
