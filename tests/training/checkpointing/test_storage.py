"""What only a disk can do: fill up, be taken away by another writer, hold links and folders."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from holdfast.training.checkpointing import storage as storage_module
from holdfast.training.checkpointing.digests import Bytes
from holdfast.training.checkpointing.manifest import FileEntry, verify
from holdfast.training.checkpointing.snapshot import FileImage
from holdfast.training.checkpointing.storage import LocalStorage
from holdfast.training.errors import CheckpointCorruptError, StorageError, StorageFullError
from holdfast.training.runs.paths import RunDirectory
from tests.training.checkpointing.checkpoints import (
    contents_at,
    managing,
    names,
    on_a_small_disk,
    save_steps,
)


def no_manifest(entries: Mapping[str, FileEntry]) -> bytes:
    return b"{}"


def make_storage(folder: Path) -> LocalStorage:
    (folder / "staging").mkdir(parents=True)
    return LocalStorage(folder / "checkpoints", folder / "staging", lambda: None)


class FourMebibytes(FileImage):
    """Says so without looking at the parts."""

    @property
    def size_bytes(self) -> int:
        return 4 * 2**20


class FillingParts(list[Bytes]):
    """Fills the disk once the first part is written, as another program may."""

    def __init__(self, parts: list[Bytes], folder: Path) -> None:
        super().__init__(parts)
        self._folder = folder

    def __iter__(self) -> Iterator[Bytes]:
        for number, part in enumerate(super().__iter__()):
            if number == 1:
                self._fill()
            yield part

    def _fill(self) -> None:
        statistics = os.statvfs(self._folder)
        free_bytes = statistics.f_bavail * statistics.f_frsize
        # The parts are hashed and written side by side: the faster of the two gets here first.
        with contextlib.suppress(FileExistsError), (self._folder / "other").open("xb") as file:
            file.write(bytes(free_bytes - 2**20))


def run_out_of_space(folder: Path) -> None:
    storage = make_storage(folder)
    storage.commit("a", {"one.json": FileImage([b"good"])}, no_manifest)
    parts = FillingParts([bytes(2**20)] * 4, folder)
    with pytest.raises(StorageFullError, match="No space left") as caught:
        storage.commit("b", {"two.json": FourMebibytes(parts)}, no_manifest)
    assert caught.value.needed_bytes == 4 * 2**20
    assert names(folder / "staging") == []
    assert storage.names() == ["a"]
    (folder / "other").unlink()
    storage.commit("b", {"two.json": FileImage([bytes(2**20)] * 4)}, no_manifest)
    with pytest.raises(StorageFullError, match=r"\d+ are free at .*: make room"):
        storage.commit("c", {"two.json": FileImage([bytes(2**20)] * 4)}, no_manifest)
    assert names(folder / "staging") == []


def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    on_a_small_disk(tmp_path, run_out_of_space)


def retry_on_a_full_disk(folder: Path) -> None:
    run = RunDirectory(folder / "e" / "a")
    with managing(run) as manager:
        manager.save(contents_at(1), wait=True)
        filler = folder / "other"
        statistics = os.statvfs(folder)
        filler.write_bytes(bytes(statistics.f_bavail * statistics.f_frsize - 2**19))
        manager.save(contents_at(2))
        with pytest.raises(StorageFullError):
            manager.wait()
        assert [info.step for info in manager.checkpoints()] == [1]
        filler.unlink()
        manager.retry()
        manager.wait()
        assert [info.step for info in manager.checkpoints()] == [1, 2]
    assert verify(run.checkpoint(2)).step == 2


def test_a_save_that_found_the_disk_full_can_be_tried_again(tmp_path: Path) -> None:
    on_a_small_disk(tmp_path, retry_on_a_full_disk)


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run = RunDirectory(tmp_path / "e" / "a")
        save_steps(run, 1)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in run.checkpoint(1).iterdir()}
    assert modes == {0o640}


def test_nothing_is_written_once_the_staging_folder_is_gone(tmp_path: Path) -> None:
    storage = make_storage(tmp_path)
    storage.commit("a", {"one.json": FileImage([b"good"])}, no_manifest)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    (tmp_path / "staging").rename(tmp_path / "fenced")
    for action in (
        lambda: storage.commit("b", {"one.json": FileImage([b"bad"])}, no_manifest),
        lambda: storage.commit("a", {"one.json": FileImage([b"bad"])}, no_manifest),
        lambda: storage.amend("a", b"bad", frozenset()),
        lambda: storage.remove("a"),
    ):
        with pytest.raises(StorageError):
            action()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_without_an_exchange_of_names_the_new_one_still_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage(tmp_path)
    monkeypatch.setattr(storage_module, "RENAME_EXCHANGE", 1 << 30)  # refused with EINVAL
    for content in (b"first", b"second"):
        storage.commit("a", {"one.json": FileImage([content])}, no_manifest)
    assert (tmp_path / "checkpoints" / "a" / "one.json").read_bytes() == b"second"
    assert names(tmp_path / "staging") == []


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_not_a_plain_file_is_never_opened(tmp_path: Path, kind: str) -> None:
    storage = make_storage(tmp_path)
    path = tmp_path / "checkpoints" / "a" / "one.json"
    path.parent.mkdir(parents=True)
    (tmp_path / "target").write_bytes(b"secret")
    {
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(tmp_path / "target"),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    with pytest.raises(CheckpointCorruptError, match=r"one\.json should be a plain file and is"):
        storage.folder("a").read("one.json", "blake3", None)


def test_bytes_that_come_back_changed_are_told_before_they_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage(tmp_path)
    monkeypatch.setattr("holdfast.training.checkpointing.local_files._write_all", _write_damaged)
    with pytest.raises(StorageError, match=r"was read back with digest .* was written"):
        storage.commit("a", {"one.json": FileImage([b"good"])}, no_manifest)
    assert storage.names() == []
    assert names(tmp_path / "staging") == []


def _write_damaged(descriptor: int, part: memoryview) -> int:
    return os.write(descriptor, bytes(part).replace(b"good", b"bad!"))
