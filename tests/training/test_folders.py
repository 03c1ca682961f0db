"""Paths mean what they meant where the program was started, wherever an experiment goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from holdfast.training.configuration.schema import RunConfig
from holdfast.training.experiment.protocol import Context
from holdfast.training.runs.directory import read_run_record
from holdfast.training.stage import StageArguments, prepared_stage, with_absolute_paths
from tests.faults.hard_experiment import Hard

THIS = Path(__file__)


class Leaving(Hard):
    """Changes the folder where it is built, and looks where its data is."""

    data_folder: Path | None = None

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        type(self).data_folder = context.data_folder
        Path("elsewhere").mkdir(exist_ok=True)
        os.chdir("elsewhere")


def staged(folder: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> StageArguments:
    monkeypatch.chdir(folder)
    asked = StageArguments(
        os.path.relpath(THIS, folder) + ":Leaving", Path("store"), "one", 1, **arguments
    )
    with prepared_stage(asked) as stage, stage.writing():
        assert Path.cwd() == folder / "elsewhere"
        assert stage.run.path == folder / "store" / "test_folders.Leaving" / "one"
        Leaving.data_folder = stage.experiment.data_folder  # type: ignore[attr-defined]
    return asked


def test_an_experiment_that_changes_the_folder_moves_neither_store_nor_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = staged(tmp_path, monkeypatch, overrides=("data.folder=data", "preemption.sources=[]"))
    assert Leaving.data_folder == tmp_path / "data"
    assert asked.run.path == tmp_path / "store" / "test_folders.Leaving" / "one"
    record = read_run_record(asked.run)
    assert record.config["data"]["folder"] == "data"
    assert record.folder == str(tmp_path)


def test_data_that_is_not_here_is_looked_for_where_the_run_was_begun(tmp_path: Path) -> None:
    begun, here = tmp_path / "begun", tmp_path / "here"
    (begun / "data").mkdir(parents=True)
    here.mkdir()
    config = RunConfig.model_validate({"data": {"folder": Path("data")}})
    assert with_absolute_paths(config, here, str(begun)).data.folder == begun / "data"
    (here / "data").mkdir()
    assert with_absolute_paths(config, here, str(begun)).data.folder == here / "data"
    assert with_absolute_paths(config, tmp_path, None).data.folder == tmp_path / "data"


def test_a_run_whose_store_was_moved_still_finds_its_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.tasks.run_summary import experiment_reference
    from holdfast.training.runs.paths import RunDirectory

    (tmp_path / "begun" / "elsewhere").mkdir(parents=True)
    asked = staged(tmp_path / "begun", monkeypatch, overrides=("preemption.sources=[]",))
    (tmp_path / "begun" / "store").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    moved = RunDirectory(tmp_path / "moved" / "test_folders.Leaving" / "one")
    file, _, name = experiment_reference(moved).rpartition(":")
    assert Path(file).resolve() == THIS
    assert name == "Leaving"
    monkeypatch.chdir(asked.folder)
    assert experiment_reference(moved) == asked.experiment
