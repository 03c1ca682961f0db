"""A run is copied between folders and buckets; the buckets are in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from holdfast.training.errors import LeaseHeldError, RunConflictError, StorageError
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.storage.protocol import PART_BYTES, Bytes, Expected
from holdfast.training.tiers import keeping
from holdfast.training.tiers.folder_image import look_at
from holdfast.training.tiers.head import HeadLease, head_key, read_head
from holdfast.training.tiers.scratch import tier_folder
from holdfast.training.upkeep import copying
from holdfast.training.upkeep.copying import copy_run
from tests.contracts.memory_objects import MemoryObjects
from tests.training.tiers.test_head import machine
from tests.training.upkeep.test_shelves import make_run

NAME = "digits/first"
ONE, OTHER = Address("s3", "runs", "one"), Address("s3", "runs", "other")


class Breaks(MemoryObjects):
    """A bucket that stops to answer after so many writes of large files."""

    num_left = 10**9

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        self._count(len(content))
        return super().put(key, content, expected)

    def upload(self, key: str, parts: Iterable[Bytes]) -> None:
        self._count(PART_BYTES)
        super().upload(key, parts)

    def _count(self, num_bytes: int) -> None:
        if num_bytes > 10_000:
            self.num_left -= 1
            if self.num_left < 0:
                raise StorageError("no answer")


@pytest.fixture
def buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Address, Breaks]:
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "scratch"))
    stores = {ONE: Breaks(), OTHER: Breaks()}
    for module in (copying, keeping):
        monkeypatch.setattr(module, "open_store", lambda address: stores[address])
    return stores


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = make_run(tmp_path / "store", "first", "preempted")
    (run.checkpoint(10) / "optimizer.safetensors").write_bytes(os.urandom(PART_BYTES + 1))
    with Lease.acquire(run, 60.0):
        pass
    return run


def contents(run: RunDirectory) -> dict[str, bytes]:
    paths = [path for path in look_at(run.path) if not path.startswith(("lease/", ".engine/"))]
    return {path: (run.path / path).read_bytes() for path in paths}


def at(address: Address) -> RunDirectory:
    return RunDirectory(tier_folder(address, "work") / NAME)


def test_a_run_goes_from_folder_to_bucket_to_bucket_to_folder(
    run: RunDirectory, buckets: dict[Address, Breaks], tmp_path: Path
) -> None:
    before = contents(run)
    done = copy_run(run, tier_folder(ONE, "work"))
    assert (done.num_files, done.num_new) == (len(before), len(before))
    assert copy_run(run, tier_folder(ONE, "work")).num_new == 0
    assert copy_run(at(ONE), tier_folder(OTHER, "work")).num_new == len(before)
    shutil.rmtree(tmp_path / "scratch")
    copy_run(at(OTHER), tmp_path / "last")
    last = RunDirectory(tmp_path / "last" / NAME)
    assert contents(last) == before == contents(run)
    assert not (last.path / "lease").exists()
    assert [path.name for path in last.path.parent.iterdir()] == ["first"]
    assert copy_run(at(OTHER), tmp_path / "last").num_new == 0
    for store, address in ((buckets[ONE], ONE), (buckets[OTHER], OTHER)):
        found = read_head(store, NAME)
        assert found is not None
        assert found[0].is_released, address


@pytest.mark.parametrize("num_writes", [0, 1])
def test_an_interrupted_copy_goes_on_where_it_stood_and_is_not_seen(
    num_writes: int, run: RunDirectory, buckets: dict[Address, Breaks], tmp_path: Path
) -> None:
    store = buckets[ONE]
    store.num_left = num_writes
    with pytest.raises(StorageError, match="no answer"):
        copy_run(run, tier_folder(ONE, "work"))
    assert store.get(head_key(NAME)) is None
    store.num_left = 10**9
    done = copy_run(run, tier_folder(ONE, "work"))
    assert (done.num_new == done.num_files) == (num_writes == 0)
    copy_run(at(ONE), tmp_path / "last")
    assert contents(RunDirectory(tmp_path / "last" / NAME)) == contents(run)


def test_what_an_interrupted_copy_left_and_somebody_swept_is_sent_again(
    run: RunDirectory, buckets: dict[Address, Breaks], tmp_path: Path
) -> None:
    store = buckets[ONE]
    store.num_left = 1
    with pytest.raises(StorageError, match="no answer"):
        copy_run(run, tier_folder(ONE, "work"))
    store.delete([entry.key for entry in store.list("runs")])
    store.num_left = 10**9
    copy_run(run, tier_folder(ONE, "work"))
    copy_run(at(ONE), tmp_path / "last")
    assert contents(RunDirectory(tmp_path / "last" / NAME)) == contents(run)


def test_a_half_copy_in_a_folder_is_used(run: RunDirectory, tmp_path: Path) -> None:
    making = tmp_path / "last" / "digits" / ".first.copying"
    shutil.copytree(run.path, making, ignore=shutil.ignore_patterns("lease", ".staging"))
    (making / "run.json").write_text("half")
    (making / "stranger").write_text("x")
    done = copy_run(run, tmp_path / "last")
    assert done.num_new == 1
    assert contents(RunDirectory(tmp_path / "last" / NAME)) == contents(run)


def test_a_run_that_is_written_is_not_copied(
    run: RunDirectory, buckets: dict[Address, Breaks], tmp_path: Path
) -> None:
    with Lease.acquire(run, 60.0), pytest.raises(LeaseHeldError):
        copy_run(run, tmp_path / "last")
    held = HeadLease.acquire(buckets[ONE], NAME, 0.4, identity=machine("b"))
    with pytest.raises(LeaseHeldError, match="on b, which renews"):
        copy_run(run, tier_folder(ONE, "work"))
    held.release()
    assert not (tmp_path / "last" / NAME).exists()


def test_another_run_of_that_name_stays_as_it_is(
    run: RunDirectory, buckets: dict[Address, Breaks], tmp_path: Path
) -> None:
    other = make_run(tmp_path / "last", "first", seed=2)
    before = contents(other)
    with pytest.raises(RunConflictError, match="another state of this one"):
        copy_run(run, tmp_path / "last")
    assert contents(other) == before
    copy_run(other, tier_folder(ONE, "work"))
    tag = buckets[ONE].list("heads")[0].key
    with pytest.raises(RunConflictError, match="another state of this one"):
        copy_run(run, tier_folder(ONE, "work"))
    assert [entry.key for entry in buckets[ONE].list("heads")] == [tag]
    with pytest.raises(RunConflictError, match="lies in that store"):
        copy_run(run, tmp_path / "store")
