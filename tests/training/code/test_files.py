"""What travels with a run, and what never does."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.code.files import (
    MAX_BYTES,
    MAX_SETTINGS_BYTES,
    CodeTooLargeError,
    travelling_files,
)


def tree(folder: Path, *names: str) -> Path:
    """A script and other files, beside it and below."""
    for name in ("train.py", *names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder / "train.py"


def test_code_and_settings_travel_and_nothing_else_does(tmp_path: Path) -> None:
    taken = ["config.yaml", "model.py", "parts/__init__.py", "parts/deep/block.py", "tokenizer.py"]
    secrets = [".env", "my_secrets.json", "Credentials.json", "passwords.ini", "token.json"]
    secrets += ["hf_token.json", "kaggle.json", "prod.env", "server.key", "api_keys_API_KEY.toml"]
    others = [".git/hook.py", "data/numbers.json", "weights.pt", "rows.csv", "venv/pyvenv.cfg"]
    others += ["venv/lib.py", "build/model.py", "parts/__pycache__/block.py", "text.txt"]
    entry = tree(tmp_path, *taken, *secrets, *others)
    (tmp_path / "large.json").write_bytes(b" " * (MAX_SETTINGS_BYTES + 1))
    (tmp_path / "link.py").symlink_to(tmp_path / "data/numbers.json")
    found = travelling_files(entry)
    assert sorted(found) == sorted(["train.py", *taken])
    assert found["model.py"] == b"model.py"


@pytest.mark.parametrize(
    ("ignored", "expected"),
    [
        ("# a comment\n\nparts/\n*.yaml\n", ["model.py", "train.py", "words.py"]),
        ("parts\n!words.txt\n!*.key\nwords.py", ["a.yaml", "model.py", "train.py", "words.txt"]),
        ("parts/block.py\nwords.*", ["a.yaml", "model.py", "parts/other.py", "train.py"]),
        ("train.py", []),
        ("*", []),
    ],
)
def test_a_file_says_what_is_left_out_and_taken_along(
    tmp_path: Path, ignored: str, expected: list[str]
) -> None:
    names = ("a.yaml", "model.py", "words.py", "words.txt", "parts/block.py", "parts/other.py")
    entry = tree(tmp_path, *names, "its.key")
    (tmp_path / ".holdfastignore").write_text(ignored)
    assert sorted(travelling_files(entry)) == expected


def test_too_much_is_refused_with_the_way_out(tmp_path: Path) -> None:
    entry = tree(tmp_path, "parts/block.py")
    with (tmp_path / "parts/table.py").open("wb") as file:
        file.truncate(MAX_BYTES)
    with pytest.raises(CodeTooLargeError, match=r"in .*\.holdfastignore"):
        travelling_files(entry)
