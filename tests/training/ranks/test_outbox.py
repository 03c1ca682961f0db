"""What ranks of a machine that has joined leave, and what of it is brought up; all in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.training.errors import InputError, StorageError
from holdfast.training.ranks.bringing import Bringing, leave
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.protocol import PART_BYTES, Bytes
from holdfast.training.tiers.bandwidth import LIMIT_VARIABLE
from holdfast.training.tiers.brought import FOLDER
from holdfast.training.tiers.head import HeadLease, run_folder
from holdfast.training.tiers.scratch import run_name
from holdfast.training.tiers.tree import Tree, parse_tree
from tests.contracts.memory_objects import MemoryObjects
from tests.flows.prefect_server import wait_until
from tests.training.tiers.test_replica import NAME

PATIENCE_S = 20.0
STEP = 10


class Refusing(MemoryObjects):
    """A bucket that takes no large file."""

    def upload(self, key: str, parts: Iterable[Bytes]) -> None:
        raise StorageError(f"cannot upload {key}")


class Joined:
    """A machine that has joined a run whose head somebody holds."""

    def __init__(self, folder: Path, store: MemoryObjects) -> None:
        self.store, self.run = store, RunDirectory(folder / NAME)
        self.run.path.mkdir(parents=True)
        self.head = HeadLease.acquire(store, run_name(self.run))
        self.folder = f"{run_folder(NAME)}/{self.head.head.folder}/{FOLDER}"
        self.bringing = Bringing(store, self.run)

    def write(self, rank: int, number: int, *sizes: int) -> list[Path]:
        """Files of a rank, which are left to be brought up."""
        place = self.run.path / f".slices-{number}-{rank}"
        place.mkdir()
        files = [place / f"part{n}-{rank:05d}-of-00004.safetensors" for n in range(len(sizes))]
        for file, size_bytes in zip(files, sizes, strict=True):
            file.write_bytes(os.urandom(size_bytes))
        leave(self.run, rank, number, STEP * number, files)
        return files

    def told(self) -> Tree:
        """What the holder is told; each is there."""
        listed = {entry.key: entry.size_bytes for entry in self.store.list(self.folder)}
        keys = [key for key in listed if key.endswith(".json")]
        if not keys:
            return Tree()
        found = self.store.get(keys[0])
        assert found is not None
        tree = parse_tree(found.content, keys[0], keys[0].removesuffix(".json"))
        assert all(listed[file.key] == file.size_bytes for file in tree.files.values())
        return tree

    def wait_until_told(self, num: int) -> Tree:
        wait_until(lambda: len(self.told().files) >= num, PATIENCE_S, f"{num} files", every_s=0.05)
        return self.told()


@contextmanager
def joined(folder: Path, store: MemoryObjects | None = None) -> Iterator[Joined]:
    machine = Joined(folder, store or MemoryObjects())
    try:
        yield machine
    finally:
        machine.bringing.finish(lambda: True)
        machine.head.release()


def test_large_files_are_brought_up_and_small_ones_left_to_the_first_machine(
    tmp_path: Path,
) -> None:
    with joined(tmp_path) as machine:
        machine.bringing.begin()
        [large, _] = machine.write(2, 1, PART_BYTES + 1, PART_BYTES)
        machine.write(3, 1, PART_BYTES + 2)
        tree = machine.wait_until_told(2)
        name = "checkpoints/step-00000010/part0-0000{}-of-00004.safetensors"
        assert [*tree.files] == [name.format(2), name.format(3)]
        found = machine.store.get(tree.files[name.format(2)].key)
        assert found is not None
        assert found.content == large.read_bytes()


def test_a_newer_save_takes_the_place_of_what_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "10")
    with joined(tmp_path) as machine:
        machine.bringing.begin()
        machine.write(2, 1, *[PART_BYTES + 1] * 4)
        machine.wait_until_told(1)
        machine.write(2, 2, PART_BYTES + 1)
        steps = [path.split("/")[1] for path in machine.wait_until_told(3).files]
        assert steps == ["step-00000010", "step-00000010", "step-00000020"]


def test_what_ranks_of_an_earlier_start_have_left_is_not_begun(tmp_path: Path) -> None:
    with joined(tmp_path) as machine:
        machine.write(2, 9, PART_BYTES + 1)
        machine.bringing.begin()
        machine.write(1, 1, PART_BYTES + 1)
        machine.wait_until_told(1)
        machine.bringing.finish(lambda: False)
        assert {path.split("/")[1] for path in machine.told().files} == {"step-00000010"}


def test_at_the_end_all_that_is_left_comes_up(tmp_path: Path) -> None:
    with joined(tmp_path) as machine:
        machine.bringing.begin()
        machine.write(2, 1, *[PART_BYTES + 1] * 3)
        machine.bringing.finish(lambda: False)
        assert len(machine.told().files) == 3


def test_a_limit_is_kept_until_there_is_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "0.01")
    with joined(tmp_path) as machine:
        machine.bringing.begin()
        machine.write(2, 1, PART_BYTES + 1)
        time.sleep(1.0)
        assert machine.told().files == {}
        machine.bringing.finish(lambda: True)
        assert len(machine.told().files) == 1


def test_nothing_more_is_sent_once_nobody_holds_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "0.01")
    with joined(tmp_path) as machine:
        machine.bringing.begin()
        machine.write(2, 1, PART_BYTES + 1)
        time.sleep(0.5)
        machine.head.release()
        start_s = time.monotonic()
        machine.bringing.finish(lambda: False)
        assert time.monotonic() - start_s < PATIENCE_S
        assert machine.told().files == {}


def test_a_bucket_that_refuses_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with joined(tmp_path, Refusing()) as machine:
        machine.bringing.begin()
        machine.write(2, 1, PART_BYTES + 1, PART_BYTES + 1)
        machine.bringing.finish(lambda: False)
    [record] = caplog.records
    assert record.message.startswith("the first machine brings up what was written here: cannot")


def test_a_limit_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "-1")
    machine = Joined(tmp_path, MemoryObjects())
    with pytest.raises(InputError, match=LIMIT_VARIABLE):
        machine.bringing.begin()
    machine.head.release()
