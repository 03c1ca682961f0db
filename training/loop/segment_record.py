"""The record that a segment keeps about itself while it lives."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from holdfast.training.errors import LeaseLostError, StorageError
from holdfast.training.exactness.versions import library_versions
from holdfast.training.preemption.notices import Notice
from holdfast.training.runs.directory import (
    RunDirectory,
    SegmentError,
    SegmentRecord,
    next_segment_number,
    utc_now,
    write_segment,
)
from holdfast.training.runs.fenced import publish_json
from holdfast.training.runs.lease import Lease
from holdfast.training.stage import failed_outcome

logger = logging.getLogger(__name__)

MAX_WRITE_EVERY_S = 1.0


class RecordKeeper:
    """Writes ``segments/<number>.json``: at the start, while training, and at the end.

    A segment that lost its lease writes nothing any more. A record that cannot be written once
    training has begun costs the record alone: it is told, and training goes on.

    While training it is written every ``write_every_s`` seconds, at least once a second, beside the
    training: of a segment that is killed, no more than that and a write is unknown.
    """

    def __init__(
        self, run: RunDirectory, lease: Lease, costs_s: dict[str, float], write_every_s: float
    ) -> None:
        self._run = run
        self._lease = lease
        self._costs_s = costs_s
        self._start_s = time.monotonic()
        self._write_every_s = min(write_every_s, MAX_WRITE_EVERY_S)
        self._written_s = float("-inf")
        self._is_failing = False
        self._thread = ThreadPoolExecutor(1, "holdfast-record")
        self._writing: Future[None] | None = None
        self._record = SegmentRecord(
            number=next_segment_number(run),
            started_at=utc_now(),
            host=socket.gethostname(),
            pid=os.getpid(),
            versions=library_versions(),
        )

    @property
    def number(self) -> int:
        """The segment's number within the run; the first is 1."""
        return self._record.number

    def begin(
        self, start_step: int, num_processes: int | None = None, num_machines: int | None = None
    ) -> None:
        """Write the record for the first time. Raises StorageError."""
        self._change(
            start_step=start_step,
            end_step=start_step,
            num_processes=num_processes,
            num_machines=num_machines,
        )
        self._write()

    def advance(self, step: int) -> None:
        """Note how far training has come, if the last note is old enough.

        Raises LeaseLostError where another process writes this run now.
        """
        if time.monotonic() - self._written_s < self._write_every_s:
            return
        if self._writing is not None:
            if not self._writing.done():
                return
            self._settle()
        self._change(end_step=step)
        self._writing = self._thread.submit(self._write)

    def end(self, outcome: str, step: int, notice: Notice | None, save_s: dict[str, float]) -> None:
        """Write the record for the last time."""
        told = None if notice is None else notice.as_record(time.monotonic())
        self._rewrite(
            outcome=outcome, end_step=step, notice=told, save_s=save_s, ended_at=utc_now()
        )

    @contextmanager
    def failure_recorded(self) -> Iterator[None]:
        """Record an error that leaves the block, and let it go on."""
        try:
            yield
        except LeaseLostError:
            raise
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Write the record for the last time, with the error that ended the segment."""
        outcome = failed_outcome(error)
        assert outcome.error is not None
        described: Any = {**outcome.error, "exit_code": outcome.exit_code}
        self._rewrite(outcome="failed", error=SegmentError(**described), ended_at=utc_now())

    def _settle(self) -> None:
        """Let the note that is on its way arrive."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._tell_failure(writing.result)

    def _rewrite(self, **changes: Any) -> None:
        """For the last time."""
        self._settle()
        self._thread.shutdown()
        self._change(**changes)
        self._tell_failure(self._write)

    def _tell_failure(self, write: Callable[[], None]) -> None:
        try:
            write()
        except StorageError as error:
            if not self._is_failing:
                logger.warning("this segment's record is out of date, training goes on: %s", error)
            self._is_failing = True
        else:
            self._is_failing = False

    def _change(self, **changes: Any) -> None:
        costs_s = {**self._costs_s}
        elapsed_s = time.monotonic() - self._start_s + costs_s.get("startup", 0.0)
        costs_s["useful"] = max(0.0, elapsed_s - sum(costs_s.values()))
        self._record = self._record.model_copy(update={**changes, "costs_s": costs_s})

    def _write(self) -> None:
        self._lease.check()
        try:
            write_segment(self._run, self._record, partial(publish_json, self._lease))
        finally:  # counted from the end: a slow store is not written to at every step
            self._written_s = time.monotonic()
