from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import RunConfig
from training.config_loading import config_digest
from training.durable_json import create_json_durably
from training.errors import (
    DataFormatError,
    InputError,
    RunConflictError,
    StorageError,
    StorageFullError,
)
from training.run_directory import (
    RunDirectory,
    RunRecord,
    SegmentError,
    SegmentRecord,
    ledger_outcome,
    next_segment_number,
    parse_step,
    read_json,
    read_run_record,
    read_segments,
    segment_duration_s,
    utc_now,
    validate_run_id,
    write_json_durably,
    write_run_record_once,
    write_segment,
)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


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


def test_paths_follow_the_documented_layout() -> None:
    run = RunDirectory(Path("store/digits/a"))
    assert run.checkpoint(420) == Path("store/digits/a/checkpoints/step-00000420")
    assert run.segment(1) == Path("store/digits/a/segments/0001.json")
    assert [path.name for path in (run.run_json, run.evaluation_json, run.report_html)] == [
        "run.json",
        "evaluation.json",
        "report.html",
    ]
    assert {run.candidates.name, run.bundle.name, run.lease.name, run.logs.name} == {
        "candidates",
        "bundle",
        "lease",
        "logs",
    }


@given(st.integers(0, 10**12))
def test_a_step_is_read_back_from_its_folder_name(step: int) -> None:
    assert parse_step(RunDirectory(Path("r")).checkpoint(step).name) == step


@pytest.mark.parametrize(
    "name", ["step-1", "step-00000001.damaged-1", "step-000000001", "Step-00000001", "step-", ""]
)
def test_other_names_are_no_steps(name: str) -> None:
    assert parse_step(name) is None


@pytest.mark.parametrize("run_id", ["a", "2026-01-01T00.00", "sweep_3+lr=0.1@x", "x" * 128])
def test_usual_run_ids_are_accepted(run_id: str) -> None:
    assert validate_run_id(run_id) == run_id


@pytest.mark.parametrize(
    "run_id",
    ["", ".", "..", "a..b", "a/b", "a\\b", "../a", ".a", "-a", "a b", "a\n", "ä", "a\0", "x" * 129],
)
def test_a_run_id_that_is_no_folder_name_is_refused(run_id: str) -> None:
    with pytest.raises(InputError, match="run id"):
        validate_run_id(run_id)


def test_json_is_deterministic_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_durably(path, {"b": [1, 2.5, None], "a": "ü"})
    first = path.read_bytes()
    write_json_durably(path, {"a": "ü", "b": [1, 2.5, None]})
    assert (
        path.read_bytes()
        == first
        == '{\n  "a": "ü",\n  "b": [\n    1,\n'.encode() + (b"    2.5,\n    null\n  ]\n}\n")
    )
    assert names(tmp_path) == ["x.json"]


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_durably(tmp_path / "x.json", float("nan"))
    assert names(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_json_durably(path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError, match="make room") as caught:
        write_json_durably(path, 2)
    assert caught.value.needed_bytes == 2
    assert caught.value.free_bytes > 0
    assert read_json(path) == 1
    assert names(tmp_path) == ["x.json"]


def test_a_missing_parent_is_a_storage_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none/x\.json"):
        write_json_durably(tmp_path / "none" / "x.json", 1)


def test_a_file_is_created_once(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert create_json_durably(path, 1)
    assert not create_json_durably(path, 2)
    assert read_json(path) == 1
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataFormatError, match=r"x\.json is not JSON"):
        read_json(path)


def test_a_folder_where_a_file_should_be_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        read_json(tmp_path)


def test_a_killed_writer_leaves_the_old_value_or_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_durably(path, {"n": -1, "text": "x" * 10_000})
    program = (
        "import sys, itertools; from pathlib import Path\n"
        "from training.durable_json import write_json_durably\n"
        "print('up', flush=True)\n"
        "for n in itertools.count():\n"
        "    write_json_durably(Path(sys.argv[1]), {'n': n, 'text': 'x' * 10_000})\n"
    )
    for delay_s in (0.0, 0.003, 0.011):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(delay_s)
            writer.send_signal(signal.SIGKILL)
        value = read_json(path)
        assert isinstance(value, dict)
        assert value["text"] == "x" * 10_000


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
    write_segment(run, segment_record())
    write_json_durably(
        run.segment(1), {**segment_record().model_dump(mode="json"), "end_step": "many"}
    )
    with pytest.raises(DataFormatError, match=r"0001\.json: end_step: .*found 'many'"):
        read_segments(run)


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


def test_the_duration_of_a_killed_segment_is_what_it_recorded() -> None:
    ended = segment_record(ended_at="2026-01-01T00:01:30Z")
    assert segment_duration_s(ended) == 90.0
    killed = segment_record(costs_s={"useful": 10.0, "saving": 2.0})
    assert segment_duration_s(killed) == 12.0


def test_records_are_read_without_torch(run: RunDirectory) -> None:
    program = "import training.run_directory, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
