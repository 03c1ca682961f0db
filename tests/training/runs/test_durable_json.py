from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.training.errors import (
    DataFormatError,
    StorageError,
    StorageFullError,
)
from holdfast.training.runs.directory import (
    read_json,
    write_json_durably,
)
from holdfast.training.runs.durable_json import create_json_durably


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


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


def test_a_killed_writer_leaves_the_old_value_or_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_durably(path, {"n": -1, "text": "x" * 10_000})
    program = (
        "import sys, itertools; from pathlib import Path\n"
        "from holdfast.training.runs.durable_json import write_json_durably\n"
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
