"""The process that sends a run to trackers. It only reads what the run keeps.

Training nudges it by a line on its standard input when a checkpoint is durable, and ends it by
closing that; so does training's death. What it could not send, the next one sends.
"""

from __future__ import annotations

import fcntl
import json
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.training.runs.directory import RunDirectory, read_run_record, run_identity
from holdfast.training.tracking.points import Point, durable_points
from holdfast.training.tracking.tracker import Tracked, Tracker, open_tracker

COMPLETED = "completed"
LOCK_NAME = ".lock"


class Sending:
    """One tracker, and how much of the run it has. One that fails is given up, and told."""

    def __init__(self, name: str, tracked: Tracked) -> None:
        self._name, self._run = name, tracked.run
        self._tracker: Tracker | None = None
        self._newest: dict[str, int] = {}
        self.has_failed = False
        with self._given_up_on_error():
            self._tracker = open_tracker(name, tracked)
            self._newest = self._tracker.newest()  # type: ignore[assignment]  # it is ours now

    def send(self) -> None:
        """Send what a durable checkpoint covers by now, and the tracker has not got."""
        with self._given_up_on_error():
            if self._tracker is not None:
                self._tracker.send(self._noted())

    def close(self, *, is_completed: bool) -> None:
        """The last call."""
        with self._given_up_on_error():
            if self._tracker is not None:
                self._tracker.close(is_completed=is_completed)

    def _noted(self) -> Iterator[Point]:
        for point in durable_points(self._run, self._newest):
            self._newest |= dict.fromkeys(point.values, point.step)
            yield point

    @contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # noqa: BLE001  # whatever a tracker's library raises
            print(f"{self._name} is given up until the next start:", file=sys.stderr)
            traceback.print_exc()
            self._tracker, self.has_failed = None, True


def track(run: RunDirectory, names: list[str], project: str | None) -> int:
    """Send until standard input ends. Returns the exit code: 1 where a tracker failed."""
    record = read_run_record(run)
    tracked = Tracked(run, record, run_identity(record), project or run.path.parent.name)
    run.tracking.mkdir(exist_ok=True)
    with (run.tracking / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the one before has ended, and sends no more
        sendings = [Sending(name, tracked) for name in names]
        is_completed = False
        for sending in sendings:
            sending.send()
        for line in sys.stdin:
            is_completed = line.strip() == COMPLETED
            for sending in sendings:
                sending.send()
        for sending in sendings:
            sending.send()
            sending.close(is_completed=is_completed)
    return int(any(sending.has_failed for sending in sendings))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when training does
    asked = json.loads(sys.argv[2])
    sys.exit(track(RunDirectory(Path(sys.argv[1])), asked["to"], asked["project"]))
