"""TensorBoard event files, where ``logging.tensorboard`` asks for them.

Each segment writes a file of its own, ``tensorboard/events.out.tfevents.<number>.segment``. It
listens to what training tells anyway, so it cannot disturb training; a file that cannot be written
is told once and given up. A file begins with the mark of a restart after the step that was
restored, by which TensorBoard drops what earlier segments recorded beyond it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from holdfast.training.configuration.schema import Json, LoggingConfig
from holdfast.training.errors import ConfigError
from holdfast.training.runs.progress import Progress

logger = logging.getLogger(__name__)
# Who reads "progress" sees the loss of one step at a moment of the clock; epochs are exact.
TOLD_NAMES = {"loss": "step/loss", "steps_per_s": "step/steps_per_s"}


def check_event_log(config: LoggingConfig) -> None:
    """Raises ConfigError where event files are asked for and the library is missing."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "logging.tensorboard = true needs the package tensorboard, which is not installed: "
            "pip install 'holdfast[tensorboard]', or set it to false"
        )


def event_file(folder: Path, segment: int) -> Path:
    """The event file of a segment; names sort as segments do, whatever their clocks say."""
    return folder / f"events.out.tfevents.{segment:010d}.segment"


@contextmanager
def told_to_event_file(progress: Progress, path: Path, start_step: int) -> Iterator[None]:
    """While the block runs, scalars that ``progress`` tells are written to the file, too."""
    log = EventLog(path, start_step)
    progress.listeners.append(log.listen)
    try:
        yield
    finally:
        progress.listeners.remove(log.listen)
        log.close()


class EventLog:
    """One event file. Every event is handed to the system at once: a kill loses none."""

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        self._writer: Any = None
        try:
            path.parent.mkdir(exist_ok=True)
            self._begin(start_step)
        except OSError as error:
            self._give_up(error)

    def listen(self, event: str, values: Mapping[str, Json]) -> None:
        """Write the scalars of one event of training."""
        scalars = scalars_of(event, values)
        step = values.get("step")
        if self._writer is None or not scalars or not isinstance(step, int):
            return
        try:
            self.write_scalars(step, scalars)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _begin(self, start_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._writer = RecordWriter(self._path.open("wb", buffering=0))
        self._write(Event(file_version="brain.Event:2"))
        mark = SessionLog(status=SessionLog.START)
        self._write(Event(step=start_step + 1, session_log=mark))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars of one step by tag. Raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())

    def _give_up(self, error: OSError) -> None:
        # Nothing is buffered, so closing has nothing left to write that could fail.
        self.close()
        logger.warning(
            "no more TensorBoard events are written: %s: %s", self._path, error.strerror or error
        )


def scalars_of(event: str, values: Mapping[str, Json]) -> dict[str, float]:
    """Scalars by TensorBoard tag; values that are not finite numbers are left out."""
    named: dict[str, Json] = {}
    if event == "progress":
        named = {tag: values.get(name) for name, tag in TOLD_NAMES.items()}
    elif event == "validation":
        metrics = values.get("metrics")
        named = {"train/loss": values.get("train_loss")}
        named["train/learning_rate"] = values.get("learning_rate")
        if isinstance(metrics, dict):
            named |= {f"validation/{name}": value for name, value in metrics.items()}
    return {
        tag: float(value)
        for tag, value in named.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
