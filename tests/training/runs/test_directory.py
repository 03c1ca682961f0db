from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast.training.configuration.loading import config_digest
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import (
    DataFormatError,
    RunConflictError,
)
from holdfast.training.runs.directory import (
    RunDirectory,
    RunRecord,
    SegmentError,
    SegmentRecord,
    ledger_outcome,
    next_segment_number,
    read_run_record,
    read_segments,
    segment_duration_s,
    utc_now,
    write_json_durably,
    write_run_record_once,
    write_segment,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "digits" / "run-1")


def run_record(fingerprint: str | None = None, **sections: dict[str, Any]) -> RunRecord:
    config = RunConfig.model_validate(sections)
    return RunRecord(
        run_id="run-1",
        experiment="digits",
        config=config.model_dump(mode="json"),
        config_digest=config_digest(config),
        data_fingerprint=fingerprint,
        created_at=utc_now(),
    )


def segment_record(number: int = 1, **changes: Any) -> SegmentRecord:
    values = {"number": number, "started_at": "2026-01-01T00:00:00Z", "host": "node", "pid": 7}
    return SegmentRecord.model_validate({**values, **changes})


def test_the_run_record_is_written_once(run: RunDirectory) -> None:
    first = run_record(train={"num_epochs": 3})
    assert write_run_record_once(run, first) == first
    again = run_record(train={"num_epochs": 3})
    assert again.created_at != first.created_at
    assert write_run_record_once(run, again) == first == read_run_record(run)


def test_what_does_not_change_the_result_may_differ(run: RunDirectory) -> None:
    first = write_run_record_once(run, run_record(data={"num_workers": 0}))
    assert write_run_record_once(run, run_record(data={"num_workers": 4})) == first


def test_a_conflict_names_the_keys_with_both_values_and_only_those(run: RunDirectory) -> None:
    write_run_record_once(run, run_record(train={"num_epochs": 3}, data={"num_workers": 1}))
    other = run_record(train={"num_epochs": 4, "clip_norm": 1.0}, data={"num_workers": 2})
    with pytest.raises(RunConflictError) as caught:
        write_run_record_once(run, other)
    message = str(caught.value)
    assert "train.num_epochs: 3 there, 4 here" in message
    assert "train.clip_norm: None there, 1.0 here" in message
    assert "num_workers" not in message


def test_a_key_of_one_side_alone_is_named_in_a_conflict(run: RunDirectory) -> None:
    write_run_record_once(run, run_record(experiment={"old": 1}))
    with pytest.raises(RunConflictError, match=r"experiment\.new: '\(absent\)' there, 2 here"):
        write_run_record_once(run, run_record(experiment={"new": 2}))


def test_other_data_under_the_same_run_id_is_a_conflict(run: RunDirectory) -> None:
    write_run_record_once(run, run_record("sha256:a"))
    write_run_record_once(run, run_record(None))
    with pytest.raises(RunConflictError, match="data_fingerprint: 'sha256:a' there"):
        write_run_record_once(run, run_record("sha256:b"))


def test_a_run_record_of_a_newer_format_is_refused(run: RunDirectory) -> None:
    write_run_record_once(run, run_record())
    content = {**json.loads(run.run_json.read_text()), "format_version": 2}
    write_json_durably(run.run_json, content)
    with pytest.raises(DataFormatError, match="format version 2"):
        read_run_record(run)


def test_a_wrong_field_is_named(run: RunDirectory) -> None:
    write_run_record_once(run, run_record())
    write_json_durably(run.run_json, {**json.loads(run.run_json.read_text()), "seeds": "many"})
    with pytest.raises(DataFormatError, match=r"run\.json: seeds: .*found 'many'"):
        read_run_record(run)


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 1, "end_step": "many"}'])
def test_a_damaged_segment_record_is_told_and_left_out(
    run: RunDirectory, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        write_segment(run, segment_record(number))
    run.segment(1).write_text(content)
    assert read_segments(run) == [segment_record(2)]
    assert "0001.json" in caplog.text


def test_a_new_run_has_no_segments(run: RunDirectory) -> None:
    assert next_segment_number(run) == 1
    assert read_segments(run) == []


def test_a_segment_rewrites_its_own_record(run: RunDirectory) -> None:
    write_segment(run, segment_record(1))
    write_segment(run, segment_record(2))
    error = SegmentError(type="ValueError", message="m", traceback="t", exit_code=1)
    last = segment_record(2, outcome="failed", error=error, notice={"source": "signal"})
    write_segment(run, last)
    (run.segments / ".0003.json.ab.tmp").write_text("{")
    assert read_segments(run) == [segment_record(1), last]
    assert next_segment_number(run) == 3


def test_segments_are_sorted_by_number_not_by_name(run: RunDirectory) -> None:
    for number in (10_000, 9_999, 2):
        write_segment(run, segment_record(number))
    assert [record.number for record in read_segments(run)] == [2, 9_999, 10_000]


def test_a_segment_that_says_running_but_is_dead_was_killed() -> None:
    assert ledger_outcome(segment_record(), is_alive=True) == "running"
    assert ledger_outcome(segment_record(), is_alive=False) == "killed"
    assert ledger_outcome(segment_record(outcome="preempted"), is_alive=False) == "preempted"


def test_a_segment_that_lost_a_machine_was_preempted() -> None:
    def failed(kind: str) -> SegmentRecord:
        return segment_record(outcome="failed", error=SegmentError(type=kind, message="gone"))

    assert ledger_outcome(failed("MachineLostError"), is_alive=False) == "preempted"
    assert ledger_outcome(failed("RankLostError"), is_alive=False) == "failed"


def test_the_duration_of_a_killed_segment_is_what_it_recorded() -> None:
    ended = segment_record(ended_at="2026-01-01T00:01:30Z")
    assert segment_duration_s(ended) == 90.0
    killed = segment_record(costs_s={"useful": 10.0, "saving": 2.0})
    assert segment_duration_s(killed) == 12.0


def test_records_are_read_without_torch(run: RunDirectory) -> None:
    program = "import holdfast.training.runs.directory, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
