"""The record that a segment keeps of itself."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from holdfast.training.loop import segment_record
from holdfast.training.loop.segment_record import MAX_WRITE_EVERY_S, RecordKeeper
from holdfast.training.runs.directory import (
    RunDirectory,
    SegmentRecord,
    read_segments,
    write_segment,
)
from holdfast.training.runs.lease import Lease


def record_with(run: RunDirectory, end_step: int) -> SegmentRecord:
    """The only record, once it has come so far."""
    deadline_s = time.monotonic() + 10.0
    while (record := read_segments(run)[0]).end_step < end_step:
        assert time.monotonic() < deadline_s, record
        time.sleep(0.01)
    return record


def test_a_killed_segment_is_known_up_to_its_last_second(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits" / "first")
    with Lease.acquire(run, 20.0) as lease:
        keeper = RecordKeeper(run, lease, {"startup": 0.5}, write_every_s=60.0)
        keeper.begin(3)
        keeper.advance(4)
        assert read_segments(run)[0].end_step == 3, "no write for each step"
        time.sleep(MAX_WRITE_EVERY_S)
        keeper.advance(7)
        keeper.advance(8)
        record = record_with(run, 7)
        assert (record.start_step, record.end_step, record.ended_at) == (3, 7, None)
        assert record.costs_s["useful"] >= MAX_WRITE_EVERY_S
        keeper.end("completed", 9, None, {})
        assert read_segments(run)[0].end_step == 9


def test_training_goes_on_while_a_slow_store_takes_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write, is_open = RunDirectory(tmp_path / "digits" / "first"), write_segment, Event()

    def write_slowly(*arguments: Any) -> None:
        assert is_open.wait(10.0)
        write(*arguments)

    with Lease.acquire(run, 20.0) as lease:
        keeper = RecordKeeper(run, lease, {}, write_every_s=0.0)
        keeper.begin(0)
        monkeypatch.setattr(segment_record, "write_segment", write_slowly)
        for step in (1, 2, 3):
            keeper.advance(step)
        assert read_segments(run)[0].end_step == 0
        is_open.set()
        assert record_with(run, 1).end_step == 1
        keeper.end("completed", 4, None, {})
    assert read_segments(run)[0].outcome == "completed"
