"""The tables that a finished run shows in Prefect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.tasks.artifacts import candidate_rows, fetching_command, parity_rows
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.tiers.scratch import tier_folder


def test_candidates_are_told_with_their_metrics_and_the_champion_is_marked(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    evaluation = {
        "candidates": [
            {"name": "best", "steps": [30], "validation": {"loss": 0.25}},
            {"name": "average-top-2", "steps": [20, 30], "validation": {"loss": 0.125}},
        ],
        "champion": {"name": "average-top-2"},
    }
    run.evaluation_json.write_text(json.dumps(evaluation))
    assert candidate_rows(run) == [
        {"candidate": "best", "loss": "0.25", "from steps": "30", "champion": ""},
        {"candidate": "average-top-2", "loss": "0.125", "from steps": "20, 30", "champion": "★"},
    ]


def test_parity_is_told_artifact_by_artifact(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.bundle.mkdir()
    entry = {"name": "1/model.onnx", "format": "onnx", "is_passed": True, "max_error": 2.18e-7}
    unknown = {"agreement": None, "new_key": 3}
    (run.bundle / "parity.json").write_text(json.dumps({"artifacts": [{**entry, **unknown}]}))
    assert parity_rows(run) == [
        {
            "artifact": "1/model.onnx",
            "proven": "yes",
            "largest error": "2.2e-07",
        }
    ]


def test_a_run_without_a_champion_has_no_rows(tmp_path: Path) -> None:
    assert candidate_rows(RunDirectory(tmp_path)) == []
    assert parity_rows(RunDirectory(tmp_path)) == []


def test_of_a_run_in_a_bucket_the_commands_are_told_that_bring_bundle_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path))
    run = RunDirectory(tier_folder(Address("s3", "runs", "team"), "work") / "digits" / "first")
    run.path.mkdir(parents=True)
    store = "--store s3://runs/team"
    assert fetching_command("report", run) == f"holdfast report digits/first --read {store}"
    assert fetching_command("bundle", run) == f"holdfast copy digits/first runs {store}"
    promotion = {"format_version": 1, "name": "digits", "version": 3, "alias": "champion"}
    promotion |= {"is_promoted": False, "reason": "worse", "previous_version": 2}
    run.promotion_json.write_text(json.dumps(promotion))
    assert fetching_command("bundle", run) == f"holdfast pull digits@3 --to model {store}"
