"""The record that a segment keeps of itself."""

from __future__ import annotations

import time
from pathlib import Path

from holdfast.training.loop.segment_record import MAX_WRITE_EVERY_S, RecordKeeper
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.lease import Lease


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
        (record,) = read_segments(run)
        assert (record.start_step, record.end_step, record.ended_at) == (3, 7, None)
        assert record.costs_s["useful"] >= MAX_WRITE_EVERY_S
        keeper.end("completed", 9, None, {})
        assert read_segments(run)[0].end_step == 9
