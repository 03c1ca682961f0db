"""What else a run was made with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from holdfast.training.exactness.surroundings import git_state, surroundings
from holdfast.training.runs.directory import RunRecord


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_the_code_and_whether_it_was_changed(tmp_path: Path) -> None:
    folder = tmp_path / "project" / "inner"
    folder.mkdir(parents=True)
    assert git_state(folder) is None
    (folder / "task.py").write_text("")
    git(tmp_path / "project", "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    assert git_state(folder) == {"commit": git(folder, "rev-parse", "HEAD"), "is_dirty": False}
    (folder / "task.py").write_text("changed")
    state = git_state(folder)
    assert state is not None
    assert state["is_dirty"] is True


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) is None


def test_packages_and_memory_are_known_and_json() -> None:
    found = json.loads(json.dumps(surroundings(None)))
    assert found["packages"]["torch"] == torch.__version__
    assert found["memory_bytes"] > 2**28
    assert found["git"] is None


def test_a_record_without_surroundings_is_read() -> None:
    older: dict[str, object] = {
        "run_id": "a",
        "experiment": "b",
        "config": {},
        "config_digest": "c",
    }
    older["created_at"] = "2026-01-31T12:00:00Z"
    assert RunRecord.model_validate({**older, "config": {}}).surroundings == {}
