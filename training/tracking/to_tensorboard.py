"""TensorBoard event files in ``tracking/tensorboard/``: every step once, over all segments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from holdfast.training.runs.event_log import EventLog, event_file
from holdfast.training.tracking.points import Point
from holdfast.training.tracking.tracker import Tracked


class TensorBoard:
    """One event file for each process that sends."""

    def __init__(self, tracked: Tracked) -> None:
        self._folder = tracked.run.tracking / "tensorboard"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._newest = self._read()
        number = len([*self._folder.iterdir()]) + 1
        newest = max(self._newest.values(), default=0)
        self._log = EventLog(event_file(self._folder, number), newest)

    def newest(self) -> Mapping[str, int]:
        """As ``Tracker.newest``."""
        return self._newest

    def send(self, points: Iterable[Point]) -> None:
        """As ``Tracker.send``."""
        for point in points:
            self._log.write_scalars(point.step, point.values)

    def close(self, *, is_completed: bool) -> None:  # noqa: ARG002
        """As ``Tracker.close``."""
        self._log.close()

    def _read(self) -> dict[str, int]:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        found: dict[str, int] = {}
        for path in sorted(self._folder.iterdir()):
            for event in EventFileLoader(str(path)).Load():
                for value in event.summary.value:
                    found[value.tag] = max(found.get(value.tag, 0), event.step)
        return found
