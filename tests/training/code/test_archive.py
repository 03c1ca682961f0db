"""The archive of a run's code: the same bytes for the same files, and nothing else is run."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest

from holdfast.training.code.archive import (
    INDEX_NAME,
    code_digest,
    index_json,
    keep_code,
    kept_code,
    unpack_code,
)
from holdfast.training.errors import DataFormatError
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from tests.training.code.test_files import tree


def kept(folder: Path, entry: Path) -> RunDirectory:
    """A run that keeps this code."""
    run = RunDirectory(folder / "run")
    run.path.mkdir(exist_ok=True)
    with Lease.acquire(run, 20.0) as lease:
        keep_code(run, lease, entry)
    return run


def archives(run: RunDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.code.glob("*.zip"))}


def test_what_was_kept_comes_out_again(tmp_path: Path) -> None:
    entry = tree(tmp_path / "project", "parts/block.py", "data/rows.csv")
    run = kept(tmp_path, entry)
    first = archives(run)
    (tmp_path / "there").mkdir()
    found = unpack_code(run, tmp_path / "there")
    assert found == tmp_path / "there/train.py"
    assert (tmp_path / "there/parts/block.py").read_text() == "parts/block.py"
    assert not (tmp_path / "there/data").exists()

    (tmp_path / "project/data/rows.csv").write_text("other data")
    assert archives(kept(tmp_path, entry)) == first
    entry.write_text("other code")
    assert len(archives(kept(tmp_path, entry))) == 2
    assert unpack_code(run, tmp_path / "there").read_text() == "other code"
    entry.write_text("train.py")
    assert archives(kept(tmp_path, entry)).items() >= first.items()
    assert unpack_code(run, tmp_path / "there").read_text() == "train.py"


def test_what_is_too_large_or_left_out_is_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = tree(tmp_path / "project")
    (entry.parent / "table.py").write_bytes(b"#" * (17 * 2**20))
    run = kept(tmp_path, entry)
    assert kept_code(run) is None
    assert "the code does not travel with the run" in caplog.text
    (entry.parent / ".holdfastignore").write_text("*")
    assert kept_code(kept(tmp_path, entry)) is None
    with pytest.raises(DataFormatError, match="keeps no code"):
        unpack_code(run, tmp_path)


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.mark.parametrize(
    "files",
    [
        {"train.py": b"other"},
        {"../train.py": b"train.py", "train.py": b"train.py"},
        {"/tmp/holdfast-was-here.py": b"", "train.py": b"train.py"},
        {"folder/": b"", "train.py": b"train.py"},
        {"..\\train.py": b"", "train.py": b"train.py"},
    ],
)
def test_an_archive_that_was_changed_is_not_run(tmp_path: Path, files: dict[str, bytes]) -> None:
    run = kept(tmp_path, tree(tmp_path / "project"))
    [path] = run.code.glob("*.zip")
    path.write_bytes(zipped(files))
    (tmp_path / "there").mkdir()
    with pytest.raises(DataFormatError, match="archive"):
        unpack_code(run, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("files", [{"../train.py": b"x", "train.py": b"y"}, {"model.py": b"x"}])
def test_an_archive_that_its_index_was_changed_for_is_not_run(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    run = kept(tmp_path, tree(tmp_path / "project"))
    digest = code_digest(files)
    (run.code / f"{digest.removeprefix('sha256:')}.zip").write_bytes(zipped(files))
    (run.code / INDEX_NAME).write_text(json.dumps(index_json(digest, "train.py", files)))
    (tmp_path / "there").mkdir()
    with pytest.raises(DataFormatError, match=r"archive|changed"):
        unpack_code(run, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    "index", [{"digest": "sha256:../x", "entry": "a.py"}, {"digest": f"sha256:{'0' * 64}",
                                                          "entry": "../a.py"}]
)  # fmt: skip
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, index: dict[str, str]) -> None:
    run = kept(tmp_path, tree(tmp_path / "project"))
    (run.code / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(DataFormatError, match="names no archive of code"):
        kept_code(run)
