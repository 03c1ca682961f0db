"""A machine that takes a run over begins with its newest checkpoint; the older ones come later."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.training.errors import StorageError
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.protocol import Object
from holdfast.training.tiers import late_files
from holdfast.training.tiers.folder_image import look_at
from holdfast.training.tiers.head import HeadLease, read_head, run_folder
from holdfast.training.tiers.late_files import absent_here, await_all, await_files, bring
from holdfast.training.tiers.replica import Replica
from holdfast.training.tiers.restoring import known_base
from holdfast.training.tiers.scratch import replica_folder
from holdfast.training.tiers.transfer import read_tree
from holdfast.training.tiers.tree import Tree
from tests.contracts.memory_objects import MemoryObjects
from tests.training.tiers.test_head import machine
from tests.training.tiers.test_replica import LARGE, NAME, contents, opened, write

FULL = ("ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")
LIGHT = FULL[:2]


def save(run: RunDirectory, step: int, names: tuple[str, ...] = FULL) -> None:
    """A checkpoint, committed as training commits one."""
    folder = run.checkpoint(step)
    staged = run.path / ".staging" / folder.name
    staged.mkdir(parents=True)
    for name in names:
        (staged / name).write_bytes(os.urandom(LARGE))
    (staged / "manifest.json").write_bytes(manifest(names))
    folder.parent.mkdir(exist_ok=True)
    staged.rename(folder)


def manifest(names: tuple[str, ...]) -> bytes:
    return json.dumps({"files": {name: {"size_bytes": LARGE} for name in names}}).encode()


@contextmanager
def taken_over(store: MemoryObjects, run: RunDirectory, host: str = "b") -> Iterator[Replica]:
    head = HeadLease.acquire(store, NAME, 0.4, identity=machine(host))
    replica = Replica(store, run, head)
    try:
        replica.restore(can_begin_early=True)
        yield replica
    finally:
        head.release()


@pytest.fixture
def store(tmp_path: Path) -> MemoryObjects:
    """With a run of three full checkpoints, and a light one that is newer."""
    store, run = MemoryObjects(), RunDirectory(tmp_path / "one" / NAME)
    write(run, "run.json", b"{}")
    for step, names in ((10, FULL), (20, FULL), (30, FULL), (40, LIGHT)):
        save(run, step, names)
    with opened(store, run) as replica:
        replica.finish(1.0)
    return store


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Where another machine has it."""
    return RunDirectory(tmp_path / "two" / NAME)


def of_bucket(store: MemoryObjects) -> Tree:
    found = read_head(store, NAME)
    assert found is not None
    assert found[0].tree is not None
    assert found[0].tree_digest is not None
    tree = read_tree(store, found[0].tree, found[0].tree_digest, run_folder(NAME))
    assert tree is not None
    return tree


def elsewhere(store: MemoryObjects, folder: Path) -> dict[str, bytes]:
    """What a machine gets that has nothing, and reads all of it at once."""
    run = RunDirectory(folder / NAME)
    with opened(store, run, "c"):
        return contents(run)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_newest_state_and_all_manifests_are_there_at_once(
    store: MemoryObjects, run: RunDirectory
) -> None:
    with taken_over(store, run):
        here = set(look_at(run.path))
    manifests = {f"checkpoints/step-000000{step}/manifest.json" for step in (10, 20, 30, 40)}
    assert here == manifests | {"run.json"} | {f"checkpoints/step-00000030/{n}" for n in FULL}


def test_what_has_not_come_yet_stays_in_the_bucket(
    store: MemoryObjects, run: RunDirectory, tmp_path: Path
) -> None:
    before = elsewhere(store, tmp_path / "before")
    with taken_over(store, run) as replica:
        save(run, 50)
        replica.bring_up()
        assert len(absent_here(run, of_bucket(store))) == 2 * len(FULL) + len(LIGHT)
        saved = {
            path: content for path, content in contents(run).items() if "step-00000050" in path
        }
    assert elsewhere(store, tmp_path / "after") == {**before, **saved}


def test_what_is_removed_or_slimmed_before_it_has_come_goes(
    store: MemoryObjects, run: RunDirectory, tmp_path: Path
) -> None:
    with taken_over(store, run) as replica:
        run.checkpoint(10).rename(run.path / ".staging-10")
        write(run, "checkpoints/step-00000020/manifest.json", manifest(LIGHT))
        replica.finish(1.0)
    names = [path.split("/")[1:] for path in elsewhere(store, tmp_path / "after")]
    assert sorted(name for step, name in names[:-1] if step == "step-00000020") == sorted(
        (*LIGHT, "manifest.json")
    )
    assert "step-00000010" not in {one[0] for one in names if one}
    kept = {entry.key for entry in store.list("runs")}
    assert of_bucket(store).keys() | {read_head(store, NAME)[0].tree} == kept  # type: ignore[index]


def test_it_comes_while_the_run_goes_on_and_is_not_sent_again(
    store: MemoryObjects, run: RunDirectory, tmp_path: Path
) -> None:
    before, keys = elsewhere(store, tmp_path / "before"), of_bucket(store).keys()
    with taken_over(store, run) as replica:
        replica.start()
        assert await_all(run, lambda: False)
        replica.finish(1.0)
        assert contents(run) == before
    assert of_bucket(store).keys() == keys


def test_a_machine_that_comes_back_goes_on_with_what_it_has(
    store: MemoryObjects, run: RunDirectory, tmp_path: Path
) -> None:
    before = elsewhere(store, tmp_path / "before")
    with taken_over(store, run):
        save(run, 50)  # does not get up
        here = contents(run)
    with taken_over(store, run):
        assert contents(run) == here
    base = json.loads((replica_folder(run) / "base.json").read_bytes())
    assert "tree_digest" not in base, "an earlier version would take the folder for whole"
    assert known_base(run) == read_head(store, NAME)[0].tree_digest  # type: ignore[index]
    with opened(store, run, "b"):
        assert contents(run) == {**before, **here}


class Watched(MemoryObjects):
    """Does something whenever a file of step 10 is read."""

    def __init__(self, store: MemoryObjects) -> None:
        super().__init__()
        self._objects = store._objects
        self.on_read: Callable[[], object] = lambda: None

    def get(self, key: str, start: int = 0, end: int | None = None) -> Object | None:
        if "step-00000010" in key:
            self.on_read()
        return super().get(key, start, end)


@pytest.mark.parametrize("change", ["removed", "slimmed", "saved again"])
def test_a_file_whose_checkpoint_changes_on_its_way_is_not_put_there(
    change: str, store: MemoryObjects, run: RunDirectory
) -> None:
    watched, path = Watched(store), "checkpoints/step-00000010/optimizer.safetensors"
    with taken_over(watched, run):
        if change == "removed":
            watched.on_read = lambda: shutil.rmtree(run.checkpoint(10))
        elif change == "slimmed":
            light = manifest(LIGHT)
            watched.on_read = lambda: write(run, f"{path.rpartition('/')[0]}/manifest.json", light)
        else:
            watched.on_read = lambda: write(run, path, b"anew")
        bring(watched, run, path, of_bucket(store).files[path])
    there = (run.path / path).read_bytes() if (run.path / path).exists() else None
    assert there == (b"anew" if change == "saved again" else None)
    assert [path.name for path in replica_folder(run).iterdir()] == ["base.json"]


def test_who_reads_an_older_checkpoint_waits_for_it(
    store: MemoryObjects, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, may_go_on = Watched(store), threading.Event()
    watched.on_read = lambda: may_go_on.wait(10.0)
    with taken_over(watched, run) as replica:
        replica.start()
        wait_until((run.checkpoint(20) / "ema.safetensors").exists)
        assert await_files(run, lambda: True, "step-00000020", FULL)
        assert not await_files(run, lambda: True, "step-00000010", FULL)
        monkeypatch.setattr(late_files, "PATIENCE_S", 0.1)
        with pytest.raises(StorageError, match="has not come from the store"):
            await_files(run, lambda: False, "step-00000010", FULL)
        monkeypatch.setattr(late_files, "PATIENCE_S", 10.0)
        threading.Timer(0.3, may_go_on.set).start()
        assert await_files(run, lambda: False, "step-00000010", FULL)
        assert await_all(run, lambda: False)
        replica.finish(1.0)
    assert await_files(run, lambda: False, "step-00000010", ("nobody.safetensors",)), (
        "lost, not late"
    )


def test_what_cannot_be_put_there_is_not_read_for_ever(
    store: MemoryObjects, run: RunDirectory
) -> None:
    watched, num_read = Watched(store), list[int]()
    watched.on_read = lambda: num_read.append(1)
    with taken_over(watched, run) as replica:
        (run.checkpoint(10) / "model.safetensors").symlink_to("/nowhere")
        num_read.clear()
        replica.start()
        assert await_all(run, lambda: False)
        replica.finish(1.0)
    assert len(num_read) == len(FULL)
