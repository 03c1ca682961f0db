"""A store is pruned; what is written, named or young stays. The bucket is in memory."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from holdfast.training.bundles.bucket_registry import BucketRegistry
from holdfast.training.bundles.registry import Registry
from holdfast.training.errors import BundleError, InputError, RunConflictError, StorageError
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.tiers import viewing
from holdfast.training.tiers.head import HeadLease, head_key, read_head
from holdfast.training.tiers.replica import Replica
from holdfast.training.tiers.scratch import tier_folder
from holdfast.training.upkeep.bucket_shelf import BucketShelf
from holdfast.training.upkeep.plan import Rule
from holdfast.training.upkeep.pruning import open_shelf, prune
from holdfast.training.upkeep.shelves import FolderShelf, Shelf
from tests.contracts.memory_objects import MemoryObjects
from tests.training.bundles.small_bundle import make_bundle
from tests.training.tiers.test_head import machine
from tests.training.tiers.test_replica import OldLists

RULE = Rule(keep_last=1, older_than_s=3600.0)
ADDRESS = Address("s3", "runs", "team")
LONG_S = 40 * 24 * 3600.0


def segment(number: int, outcome: str) -> dict[str, object]:
    moment = "2026-01-31T12:00:00Z"
    told = {
        "format_version": 1,
        "number": number,
        "started_at": moment,
        "ended_at": moment,
        "outcome": outcome,
    }
    return {**told, "host": "h", "pid": 1}


def make_run(store: Path, name: str, outcome: str = "completed", **config: object) -> RunDirectory:
    run = RunDirectory(store / "digits" / name)
    record = {
        "format_version": 1,
        "run_id": name,
        "experiment": "digits",
        "config": config,
        "config_digest": "x",
        "created_at": "2026-01-31T12:00:00Z",
    }
    run.segments.mkdir(parents=True)
    run.run_json.write_text(json.dumps(record))
    run.segment(1).write_text(json.dumps(segment(1, outcome)))
    run.checkpoint(10).mkdir(parents=True)
    (run.checkpoint(10) / "model.safetensors").write_bytes(os.urandom(20_000))
    return run


def age(path: Path, seconds: float = LONG_S) -> None:
    moment_s = time.time() - seconds
    for one in [*path.rglob("*"), path]:
        os.utime(one, (moment_s, moment_s))


class Aged(MemoryObjects):
    """A bucket whose objects can be made old."""

    def age(self, prefix: str, seconds: float = LONG_S) -> None:
        for key, (content, tag, _) in list(self._objects.items()):
            if key.startswith(prefix):
                self._objects[key] = (content, tag, time.time() - seconds)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Aged:
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "scratch"))
    store = Aged()
    monkeypatch.setattr(viewing, "open_store", lambda _: store)
    return store


def bring_up(store: MemoryObjects, run: RunDirectory, host: str = "a") -> None:
    head = HeadLease.acquire(store, f"digits/{run.path.name}", identity=machine(host))
    replica = Replica(store, run, head)
    replica.restore()
    replica.finish(1.0)
    head.release()


def test_a_folder_loses_what_is_old_and_nothing_else(tmp_path: Path) -> None:
    for name in ("old", "killed", "weights", "written"):
        make_run(tmp_path, name, "running" if name == "killed" else "completed")
        age(tmp_path / "digits" / name)
    make_run(tmp_path, "new", path="/elsewhere/digits/weights/checkpoints/step-00000010")
    (tmp_path / "digits" / ".half.pruned-0123456789abcdef").mkdir()
    (tmp_path / "digits" / ".fork-x-0123456789ab").mkdir()
    written = RunDirectory(tmp_path / "digits" / "written")
    with Lease.acquire(written, 60.0):
        told = prune(FolderShelf(tmp_path), RULE, is_dry_run=True)
        assert [one.name for one in told.gone] == ["digits/old"]
        assert (tmp_path / "digits" / "old").is_dir()
        done = prune(FolderShelf(tmp_path), RULE)
    assert [one.name for one in done.gone] == ["digits/old"]
    assert done.gone[0].num_bytes is not None
    assert done.gone[0].num_bytes > 20_000
    assert set(done.kept) == {"digits/killed", "digits/weights", "digits/written", "digits/new"}
    assert "writes it" in done.kept["digits/written"]
    assert "resume it" in done.kept["digits/killed"]
    found = sorted(path.name for path in (tmp_path / "digits").iterdir())
    assert found == [".fork-x-0123456789ab", "killed", "new", "weights", "written"]
    assert done.num_leftovers == 1


def test_a_run_that_is_begun_between_the_look_and_the_deletion_stays(tmp_path: Path) -> None:
    shelf = FolderShelf(tmp_path)
    run = make_run(tmp_path, "old")
    age(run.path)
    [seen] = shelf.runs()
    run.segment(2).write_text(json.dumps(segment(2, "running")))
    with pytest.raises(RunConflictError, match="was changed since"):
        shelf.remove(seen)
    assert run.run_json.is_file()


def test_a_bucket_loses_what_is_old_and_nothing_else(tmp_path: Path, bucket: Aged) -> None:
    for name in ("old", "killed", "new"):
        run = make_run(tmp_path, name, "running" if name == "killed" else "completed")
        bring_up(bucket, run)
    bucket.age("heads/digits/old")
    bucket.age("heads/digits/killed")
    orphan = "runs/digits/new/00000001-0123456789abcdef/000009/x"
    lone = "runs/digits/gone/00000001-0123456789abcdef/000001/x"
    for key in (orphan, lone, "bundles/digits/0011/x"):
        bucket.put(key, b"x", "any")
        bucket.age(key)
    bucket.put("runs/digits/young/00000001-0123456789abcdef/000001/x", b"x", "any")
    shelf = BucketShelf(ADDRESS, bucket)
    told = prune(shelf, RULE, is_dry_run=True)
    assert ([one.name for one in told.gone], told.num_leftovers) == (["digits/old"], 3)
    before = [entry.key for entry in bucket.list("")]
    done = prune(shelf, RULE)
    assert ([one.name for one in done.gone], done.num_leftovers) == (["digits/old"], 3)
    after = [entry.key for entry in bucket.list("")]
    assert set(before) - set(after) == {
        orphan,
        lone,
        "bundles/digits/0011/x",
        *(key for key in before if "digits/old" in key),
    }
    other = RunDirectory(tmp_path / "elsewhere" / "digits" / "new")
    bring_up(bucket, other, "b")
    assert (other.checkpoint(10) / "model.safetensors").is_file()


def test_a_run_that_is_written_in_a_bucket_is_never_touched(tmp_path: Path, bucket: Aged) -> None:
    run = make_run(tmp_path, "old")
    bring_up(bucket, run)
    bucket.age("heads")
    bucket.age("runs")
    shelf = BucketShelf(ADDRESS, bucket)
    [seen] = shelf.runs()
    head = HeadLease.acquire(bucket, "digits/old", 0.4, identity=machine("b"))
    done = prune(shelf, Rule(1, 0.0))
    assert [one.name for one in done.gone] == []
    head.commit("runs/digits/old/other.json", "blake3:" + "0" * 64)
    head.release()
    with pytest.raises(RunConflictError, match="was changed since"):
        shelf.remove(seen)
    assert read_head(bucket, "digits/old") is not None


def test_a_head_that_names_nothing_goes_and_the_id_can_be_taken_again(bucket: Aged) -> None:
    refused = HeadLease.acquire(bucket, "digits/refused")
    refused.remove()
    assert bucket.get(head_key("digits/refused")) is None
    HeadLease.acquire(bucket, "digits/older").release()
    prune(BucketShelf(ADDRESS, bucket), RULE)
    assert bucket.list("heads") == []
    HeadLease.acquire(bucket, "digits/older").release()


def test_a_holder_that_slept_does_not_delete_the_head_of_the_next(bucket: Aged) -> None:
    first = HeadLease.acquire(bucket, "digits/a", 0.4, identity=machine("a"))
    first._stop()
    second = HeadLease.acquire(bucket, "digits/a", 0.4, identity=machine("b"))
    first.remove()
    second.check()
    assert read_head(bucket, "digits/a") is not None
    second.release()


@pytest.fixture(params=["folder", "bucket"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Registry, Shelf]:
    if request.param == "folder":
        return Registry(tmp_path / "store"), FolderShelf(tmp_path / "store")
    bucket = request.getfixturevalue("bucket")
    return BucketRegistry(ADDRESS, bucket), BucketShelf(ADDRESS, bucket)


def test_versions_go_but_for_the_newest_and_those_of_aliases(
    registry: tuple[Registry, Shelf], tmp_path: Path
) -> None:
    store, shelf = registry
    for number in range(1, 5):
        store.publish(make_bundle(tmp_path / f"bundle-{number}", number))
    store.point_alias("digits", "champion", 2, "good")
    done = prune(shelf, Rule(1, 0.0))
    assert sorted(one.name for one in done.gone) == ["digits@1", "digits@3"]
    assert store.versions("digits") == [2, 4]
    assert store.manifest("digits", 2)["run"]["run_id"] == "run-2"
    assert store.publish(make_bundle(tmp_path / "bundle-5", 5)) == ("digits", 5)
    with pytest.raises(InputError, match="has no version 3"):
        store.point_alias("digits", "champion", 3, "gone")


def test_a_version_that_an_alias_comes_to_stand_for_stays(
    registry: tuple[Registry, Shelf], tmp_path: Path
) -> None:
    store, shelf = registry
    for number in (1, 2):
        store.publish(make_bundle(tmp_path / f"bundle-{number}", number))
    first = shelf.versions()[0]
    store.point_alias("digits", "champion", 1, "meanwhile")
    with pytest.raises(RunConflictError, match="come to stand for digits@1"):
        shelf.remove(first)
    assert store.versions("digits") == [1, 2]
    assert store.manifest("digits", 1)["run"]["run_id"] == "run-1"


def test_a_version_that_is_pruned_while_an_alias_moves_to_it_is_told(
    registry: tuple[Registry, Shelf], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = registry
    for number in (1, 2):
        store.publish(make_bundle(tmp_path / f"bundle-{number}", number))
    seen = iter([[1, 2], [2]])
    monkeypatch.setattr(store, "versions", lambda _: next(seen))
    with pytest.raises(InputError, match="digits@1 was pruned in this moment"):
        store.move_alias("digits", "champion", 1, reason="good", after=None)


def test_a_store_that_lists_what_is_over_is_not_pruned(tmp_path: Path) -> None:
    store = OldLists()
    bring_up(store, make_run(tmp_path, "old"))
    bring_up(store, make_run(tmp_path, "new"))
    registry = BucketRegistry(ADDRESS, store)
    registry.publish(make_bundle(tmp_path / "bundle-1", 1))
    store.stop_listing()
    registry.publish(make_bundle(tmp_path / "bundle-2", 2))
    before = MemoryObjects.list(store, "")
    with pytest.raises(StorageError, match="does not list what was just written"):
        prune(BucketShelf(ADDRESS, store), Rule(1, 0.0))
    assert MemoryObjects.list(store, "") == before
    with pytest.raises(BundleError, match="at the same time; try again"):
        registry.publish(make_bundle(tmp_path / "bundle-3", 3))
    assert {entry.key for entry in before} <= {e.key for e in MemoryObjects.list(store, "")}


def test_a_store_that_is_empty_is_pruned_of_nothing(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    done = prune(open_shelf(tmp_path), RULE)
    assert (done.gone, done.num_leftovers) == ((), 0)


def test_a_bucket_is_known_by_its_folder(bucket: Aged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.training.upkeep.bucket_shelf.open_store", lambda _: bucket)
    assert isinstance(open_shelf(tier_folder(ADDRESS, "work")), BucketShelf)
