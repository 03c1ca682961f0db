"""Attempts at a stage, written into the run: what the two budgets are counted from.

An attempt is one start of a stage's process by a flow run. It is noted before the process starts
and again when it has ended, so that an attempt whose machine vanished is seen as well: it was
begun and never ended. Nothing is counted in memory; a flow run that goes on elsewhere counts on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from holdfast.training.errors import DataFormatError, StorageError
from holdfast.training.runs.directory import RunDirectory, parse_step, utc_now
from holdfast.training.runs.stored_json import (
    NO_FOLLOW,
    Kinds,
    parse_json,
    read_plain_file,
    required_fields,
)

Ending = Literal["completed", "preempted", "failed", "lost"]
LOG_NAME = "attempts.jsonl"
MAX_LOG_BYTES = 64 * 2**20
FIELDS: Kinds = {"event": (str,), "step": (int,)}


@dataclass(frozen=True)
class Attempt:
    """One start of a stage's process.

    Attributes:
        ending: ``lost`` where nobody lived to see it.
        start_step: newest checkpoint when it began.
        end_step: newest checkpoint when it ended.
    """

    ending: Ending
    start_step: int
    end_step: int

    @property
    def has_progress(self) -> bool:
        """Whether a checkpoint moved forward."""
        return self.end_step > self.start_step


class AttemptLog:
    """The attempts of one flow run at one stage of a run, in ``logs/attempts.jsonl``.

    A person who starts the run again after a fault is gone makes a new flow run, which has budgets
    of its own; a flow run that goes on elsewhere is still the same.
    """

    def __init__(self, run: RunDirectory, stage: str, flow_run_id: str = "") -> None:
        self._run = run
        self._of = {"stage": stage, "flow_run": flow_run_id}
        self._path = run.logs / LOG_NAME

    def begin(self) -> None:
        """Note that a process is about to start. Raises StorageError."""
        self._append({"event": "begin"})

    def end(self, ending: Ending, exit_code: int | None, error: str | None = None) -> None:
        """Note that it has ended. Raises StorageError."""
        self._append({"event": "end", "ending": ending, "exit_code": exit_code, "error": error})

    def read(self) -> list[Attempt]:
        """All attempts so far, the oldest first; one that still runs is ``lost``."""
        return list(_paired(self._entries(), newest_step(self._run)))

    def _entries(self) -> Iterator[dict[str, Any]]:
        try:
            content, _ = read_plain_file(self._path, MAX_LOG_BYTES)
        except FileNotFoundError:
            return
        for line in content.splitlines():
            try:
                entry = required_fields(parse_json(line, str(self._path)), self._path, FIELDS)
            except DataFormatError:
                continue  # its writer was killed in the middle of it
            is_whole = entry["event"] == "begin" or entry.get("ending") in get_args(Ending)
            if is_whole and all(entry.get(name) == value for name, value in self._of.items()):
                yield entry

    def _append(self, entry: dict[str, Any]) -> None:
        entry = {**entry, **self._of, "at": utc_now(), "pid": os.getpid()}
        entry["step"] = newest_step(self._run)
        # A line begins with a line break: the one before may have been cut off.
        content = f"\n{json.dumps(entry)}\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _append_durably(self._path, content.encode())
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error


def newest_step(run: RunDirectory) -> int:
    """The step of the newest committed checkpoint, by its name; 0 for none."""
    try:
        steps = [parse_step(path.name) for path in run.checkpoints.iterdir()]
    except OSError:
        return 0
    return max((step for step in steps if step is not None), default=0)


def crashes_in_a_row(attempts: Sequence[Attempt]) -> int:
    """Crashes at the end of the list without progress between them; preemptions don't count."""
    num = 0
    for attempt in reversed(attempts):
        num += attempt.ending == "failed"
        if attempt.has_progress:
            break
    return num


def idle_preemptions_in_a_row(attempts: Sequence[Attempt]) -> int:
    """Preemptions and lost machines at the end of the list since there was progress."""
    num = 0
    for attempt in reversed(attempts):
        if attempt.has_progress:
            break
        num += attempt.ending in ("preempted", "lost")
    return num


def _paired(entries: Iterator[dict[str, Any]], step: int) -> Iterator[Attempt]:
    begun: dict[str, Any] | None = None
    for entry in entries:
        if entry["event"] == "begin":
            if begun is not None:
                yield Attempt("lost", begun["step"], entry["step"])
            begun = entry
        elif begun is not None:
            yield Attempt(entry["ending"], begun["step"], entry["step"])
            begun = None
    if begun is not None:
        yield Attempt("lost", begun["step"], step)


def _append_durably(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_FOLLOW
    descriptor = os.open(path, flags, 0o644)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
