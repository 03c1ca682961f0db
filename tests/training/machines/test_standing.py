"""How a run stands that machines wait for, as its own records tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import InputError
from holdfast.training.machines.standing import Standing, standing_of
from holdfast.training.runs.directory import (
    Outcome,
    RunDirectory,
    RunRecord,
    SegmentRecord,
    utc_now,
    write_run_record_once,
    write_segment,
)


def begin(store: Path, name: str, **distributed: Any) -> RunDirectory:
    run = RunDirectory(store / name)
    config = RunConfig.model_validate({"distributed": distributed}).model_dump(mode="json")
    record = RunRecord(
        run_id=run.path.name,
        experiment=run.path.parent.name,
        config=config,
        config_digest="",
        created_at=utc_now(),
    )
    write_run_record_once(run, record)
    return run


def end_segment(run: RunDirectory, number: int, outcome: Outcome) -> None:
    record = SegmentRecord(number=number, started_at=utc_now(), host="", pid=1, outcome=outcome)
    write_segment(run, record)


def test_a_run_is_trained_once_its_last_segment_has_completed(tmp_path: Path) -> None:
    assert standing_of(tmp_path, "first") is None
    run = begin(tmp_path, "digits/first", strategy="ddp", num_shards=4, max_machines=3)
    assert standing_of(tmp_path, "first") == Standing("digits/first", False, 3)
    end_segment(run, 1, "preempted")
    assert standing_of(tmp_path, "first") == Standing("digits/first", False, 3)
    end_segment(run, 2, "completed")
    assert standing_of(tmp_path, "digits/first") == Standing("digits/first", True, 3)
    assert standing_of(tmp_path, "*") is None


def test_a_run_that_says_nothing_of_machines_is_one_machines(tmp_path: Path) -> None:
    begin(tmp_path, "digits/first")
    assert standing_of(tmp_path, "first") == Standing("digits/first", False, 1)


def test_an_id_of_two_experiments_is_refused(tmp_path: Path) -> None:
    for name in ("digits/first", "turbofan/first"):
        begin(tmp_path, name)
    with pytest.raises(InputError, match="ambiguous: digits/first, turbofan/first"):
        standing_of(tmp_path, "first")
