"""The metrics history as files for other programs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from holdfast.training.reporting.facts import history_files
from holdfast.training.runs.paths import RunDirectory


def run_with(folder: Path, *entries: dict[str, object]) -> RunDirectory:
    run = RunDirectory(folder)
    path = run.checkpoint(7) / "state.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"history": entries}))
    return run


def entry(epoch: int, loss: object) -> dict[str, object]:
    metrics = {"loss": loss, "accuracy": 0.5}
    return {
        "epoch": epoch,
        "step": 3 * epoch,
        "train_loss": 0.25,
        "learning_rate": 0.1,
        "metrics": metrics,
    }


def test_each_epoch_is_a_row_in_both_files(tmp_path: Path) -> None:
    files = history_files(run_with(tmp_path, entry(1, 0.75), entry(2, {"$float": "nan"})))
    rows = json.loads(files["history.json"], parse_constant=lambda _: 1 / 0)
    assert rows[0] == {"epoch": 1, "step": 3, "train_loss": 0.25, "learning_rate": 0.1,
                       "loss": 0.75, "accuracy": 0.5}  # fmt: skip
    assert rows[1]["loss"] == "nan"
    lines = list(csv.DictReader(files["history.csv"].decode().splitlines()))
    assert [line["loss"] for line in lines] == ["0.75", "nan"]
    assert [line["step"] for line in lines] == ["3", "6"]


def test_before_an_epoch_has_ended_there_is_none(tmp_path: Path) -> None:
    assert history_files(RunDirectory(tmp_path / "absent")) == {}
    assert history_files(run_with(tmp_path / "empty")) == {}
