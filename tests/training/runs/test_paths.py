from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.errors import (
    InputError,
)
from holdfast.training.runs.directory import (
    RunDirectory,
    parse_step,
    validate_run_id,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "digits" / "run-1")


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
