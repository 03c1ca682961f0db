"""What a run's directory says about the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.tasks.run_summary import summarize
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.ledger import ledger


def write_segment(run: RunDirectory, number: int, start_step: int, end_step: int) -> None:
    """A segment of 100 s: 10 s to start, 5 s of saving, the rest trained."""
    minute = 3 * number
    record = {
        "number": number,
        "started_at": f"2026-01-01T00:{minute:02d}:10.000000Z",
        "ended_at": f"2026-01-01T00:{minute + 1:02d}:40.000000Z",
        "outcome": "preempted",
        "start_step": start_step,
        "end_step": end_step,
        "costs_s": {"startup": 10.0, "useful": 85.0, "saving": 5.0},
        "format_version": 1,
        "error": None,
        "notice": None,
        "host": "here",
        "pid": 1,
        "save_s": {},
        "versions": {},
    }
    run.segments.mkdir(parents=True, exist_ok=True)
    run.segment(number).write_text(json.dumps(record))


def test_steps_that_were_done_twice_do_not_count_as_useful(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits" / "twice")
    write_segment(run, 1, 0, 100)
    write_segment(run, 2, 50, 150)
    found = summarize(run)
    assert found.goodput == ledger(read_segments(run)).goodput
    assert found.goodput == pytest.approx((85 + 42.5) / 200)
    assert found.ledger_s["recomputed"] == pytest.approx(42.5)
    assert found.ledger_s["waiting"] == pytest.approx(80.0)


def test_a_run_without_segments_has_no_goodput(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits" / "new")
    run.path.mkdir(parents=True)
    assert summarize(run).goodput is None
    assert summarize(run).state == "new"
