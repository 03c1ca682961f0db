"""What a process tells while it works: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TextIO

from holdfast.training.configuration.schema import Json
from holdfast.training.runs.durable_json import without_nan
from holdfast.training.runs.shown_text import shown

ProgressFormat = Literal["text", "jsonl", "none"]


@dataclass
class Progress:
    """Emits events. Text goes to stderr, JSON lines go to stdout, with "nan" for what is NaN.

    Attributes:
        every_s: at most one ``progress`` event in so many seconds; other events always come.
        listeners: are called with every event and its values, whatever the format.
    """

    format: ProgressFormat = "text"
    every_s: float = 5.0
    stream: TextIO | None = None
    listeners: list[Callable[[str, Mapping[str, Json]], None]] = field(default_factory=list)
    _last_progress_s: float = field(default=float("-inf"), init=False)

    def emit(self, event: str, **values: Json) -> None:
        """Tell one event now. Where the reader is gone, nothing is told from here on.

        The reader may be an engine that was killed; this process still has to save.
        """
        for listener in self.listeners:
            listener(event, values)
        try:
            self._write(event, values)
        except BrokenPipeError:
            self.format = "none"
            silence_output()

    def _write(self, event: str, values: dict[str, Json]) -> None:
        if self.format == "jsonl":
            line = json.dumps(without_nan({"event": event, **values}), allow_nan=False)
            write_line(line, self.stream or sys.stdout)
        elif self.format == "text":
            write_line(as_text(event, values), self.stream or sys.stderr)

    def is_due(self) -> bool:
        """Whether a ``progress`` event should be told; True at most once in ``every_s``."""
        now_s = time.monotonic()
        if now_s - self._last_progress_s < self.every_s:
            return False
        self._last_progress_s = now_s
        return True


def write_line(line: str, stream: TextIO) -> None:
    """A line in one piece, as ``print`` does not where output is unbuffered, as in containers.

    Whoever is killed in between would leave half a line to the process that writes there next.
    """
    stream.write(f"{line}\n")
    stream.flush()


def silence_output() -> None:
    """Send what this process still prints to nowhere, so that printing it cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def as_text(event: str, values: Mapping[str, Json]) -> str:
    """An event as a line for people."""
    parts = [
        f"{name}={shown(_short(value))}" for name, value in values.items() if value is not None
    ]
    return f"{time.strftime('%H:%M:%S')} {event:<10} {' '.join(parts)}"


def _short(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{name}={_short(item)}" for name, item in value.items())
    return str(value)
