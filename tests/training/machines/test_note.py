"""Notes of where runs meet, in a folder and in a bucket."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.flows.command_line.stores import find_runs
from holdfast.training.errors import DataFormatError, InputError
from holdfast.training.machines.note import (
    Board,
    BucketBoard,
    FolderBoard,
    Note,
    note_of,
    note_trained,
    own_machine,
)
from holdfast.training.runs.paths import RunDirectory
from tests.contracts.memory_objects import MemoryObjects

NOTE = Note("digits/first", "digits", "10.0.0.1", 4567)


@pytest.fixture(params=["folder", "bucket"])
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Board:
    if request.param == "folder":
        return FolderBoard(tmp_path)
    return BucketBoard(MemoryObjects())


def test_the_newest_note_of_a_run_is_read(board: Board, tmp_path: Path) -> None:
    assert note_of(board, "first") is None
    assert note_of(board, "digits/first") is None
    board.write(NOTE)
    assert note_of(board, "first") == note_of(board, "digits/first") == NOTE
    board.write(replace(NOTE, state="completed"))
    found = note_of(board, "first")
    assert found is not None
    assert (found.state, found.token, found.run_id) == ("completed", NOTE.token, "first")
    assert found.machine == own_machine()
    assert find_runs(tmp_path) == []


def test_who_waits_for_a_run_that_has_ended_is_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits" / "first")
    note_trained(run)
    board = FolderBoard(tmp_path)
    assert board.names() == []
    board.write(NOTE)
    note_trained(run)
    assert board.read("digits/first") == replace(NOTE, state="completed")


def test_an_id_of_two_experiments_is_refused(board: Board) -> None:
    for name in ("digits/first", "turbofan/first"):
        board.write(replace(NOTE, name=name))
    with pytest.raises(InputError, match="ambiguous: digits/first, turbofan/first"):
        note_of(board, "first")


@pytest.mark.parametrize(
    "change",
    [
        {"port": 0},
        {"state": "perhaps"},
        {"name": "../first"},
        {"format_version": 2},
    ],
)
def test_what_no_machine_has_written_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    board = FolderBoard(tmp_path)
    board.write(NOTE)
    [path] = tmp_path.rglob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataFormatError, match="is no note of this version of Holdfast"):
        board.read("digits/first")
