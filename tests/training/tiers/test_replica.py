"""A run's folder and its copy in a bucket; the bucket is in memory."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.training.checkpointing.diff import compare
from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.manifest import verify
from holdfast.training.errors import DataFormatError, LeaseLostError, StorageError
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.protocol import Bytes, Expected, Listing, Object
from holdfast.training.tiers.folder_image import look_at, take_image
from holdfast.training.tiers.head import HeadLease, head_key, read_head, run_folder
from holdfast.training.tiers.replica import Replica
from holdfast.training.tiers.scratch import run_name
from holdfast.training.tiers.transfer import read_tree
from holdfast.training.tiers.tree import Tree, TreeFile, parse_tree
from tests.contracts.memory_objects import MemoryObjects
from tests.training.checkpointing.checkpoints import contents_at
from tests.training.checkpointing.slices_in_rows import save_slices
from tests.training.tiers.test_head import machine

NAME = "digits/first"
LARGE = 20_000


class Outage(MemoryObjects):
    """A bucket that does not answer while ``is_down``, or flips a bit while ``is_flipping``."""

    is_down = False
    is_flipping = False

    def get(self, key: str, start: int = 0, end: int | None = None) -> Object | None:
        if self.is_down:
            raise StorageError("no answer")
        found = super().get(key, start, end)
        if found is not None and self.is_flipping and len(found.content) == LARGE:
            return Object(bytes([found.content[0] ^ 1]) + found.content[1:], found.tag)
        return found

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        if self.is_down:
            raise StorageError("no answer")
        return super().put(key, content, expected)


class OldLists(MemoryObjects):
    """A bucket that lists what was there at one moment."""

    _listed: Listing | None = None

    def stop_listing(self) -> None:
        self._listed = super().list("")

    def list(self, prefix: str) -> Listing:
        if self._listed is None:
            return super().list(prefix)
        return [entry for entry in self._listed if entry.key.startswith(f"{prefix}/")]


def write(run: RunDirectory, path: str, content: bytes) -> None:
    target = run.path / path
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.tmp")
    beside.write_bytes(content)
    beside.replace(target)


def contents(run: RunDirectory) -> dict[str, bytes]:
    return {path: (run.path / path).read_bytes() for path in look_at(run.path)}


def new_run(folder: Path) -> RunDirectory:
    run = RunDirectory(folder / NAME)
    write(run, "run.json", b"{}")
    write(run, "checkpoints/step-00000010/manifest.json", b'{"step": 10}')
    write(run, "checkpoints/step-00000010/model.safetensors", os.urandom(LARGE))
    write(run, "losses/0001-1", b"\x00\xff" * 40)
    return run


@contextmanager
def opened(store: MemoryObjects, run: RunDirectory, host: str = "a") -> Iterator[Replica]:
    head = HeadLease.acquire(store, run_name(run), 0.4, identity=machine(host))
    replica = Replica(store, run, head)
    try:
        replica.restore()
        yield replica
    finally:
        head.release()


def test_another_machine_gets_the_same_folder(tmp_path: Path) -> None:
    store, run = MemoryObjects(), new_run(tmp_path / "one")
    with opened(store, run) as replica:
        replica.finish(1.0)
    other = RunDirectory(tmp_path / "two" / NAME)
    with opened(store, other, "b"):
        assert contents(other) == contents(run)


def test_a_checkpoint_of_slices_goes_along_whole(tmp_path: Path) -> None:
    store, run = MemoryObjects(), new_run(tmp_path / "one")
    save_slices(run, 3, contents_at(20))
    with opened(store, run) as replica:
        replica.finish(1.0)
    other = RunDirectory(tmp_path / "two" / NAME)
    with opened(store, other, "b"):
        assert len(verify(other.checkpoint(20)).files_of("model.safetensors")) == 3
        assert compare(run.checkpoint(20), other.checkpoint(20)).differences == []


def test_only_what_is_new_is_sent_and_what_is_old_is_deleted(tmp_path: Path) -> None:
    store, run = MemoryObjects(), new_run(tmp_path)
    with opened(store, run) as replica:
        replica.bring_up()
        first = {entry.key for entry in store.list("runs")}
        write(run, "checkpoints/step-00000020/model.safetensors", os.urandom(LARGE))
        replica.bring_up()
        second = {entry.key for entry in store.list("runs")}
        assert len([key for key in second - first if "model" in key]) == 1
        (run.checkpoints / "step-00000010" / "model.safetensors").unlink()
        replica.finish(1.0)
    keys = [entry.key for entry in store.list("runs")]
    assert len(keys) == 2, keys  # one model, and the tree
    assert not any("step-00000010/model" in key for key in keys)


def test_a_disk_that_came_back_is_taken_as_it_is(tmp_path: Path) -> None:
    store, run = MemoryObjects(), new_run(tmp_path)
    with opened(store, run) as replica:
        replica.finish(1.0)
    write(run, "checkpoints/step-00000020/manifest.json", b'{"step": 20}')  # did not get up
    before = contents(run)
    with opened(store, run):
        assert contents(run) == before


def test_a_disk_that_was_overtaken_is_made_anew(tmp_path: Path) -> None:
    store, run = MemoryObjects(), new_run(tmp_path / "one")
    with opened(store, run) as replica:
        replica.finish(1.0)
    other = RunDirectory(tmp_path / "two" / NAME)
    with opened(store, other, "b") as replica:
        write(other, "checkpoints/step-00000020/manifest.json", b"of the other")
        replica.finish(1.0)
    write(run, "checkpoints/step-00000020/manifest.json", b"of ours, too late")
    inode = (run.checkpoints / "step-00000010" / "model.safetensors").stat().st_ino
    with opened(store, run):
        assert contents(run) == contents(other)
        kept = run.checkpoints / "step-00000010" / "model.safetensors"
        assert kept.stat().st_ino == inode  # was not read again


def test_what_dead_holders_left_is_swept_and_what_counts_stays(tmp_path: Path) -> None:
    store, run = MemoryObjects(), new_run(tmp_path / "one")
    with opened(store, run) as replica:
        replica.finish(1.0)
    orphan = f"{run_folder(NAME)}/00000001-{'0' * 16}/000009/checkpoints/x"
    store.put(orphan, b"half", "any")
    other = RunDirectory(tmp_path / "two" / NAME)
    with opened(store, other, "b"):
        assert store.get(orphan) is None
        assert contents(other) == contents(run)


def test_a_holder_that_was_replaced_changes_nothing_and_its_training_learns_it(
    tmp_path: Path,
) -> None:
    store, run = MemoryObjects(), new_run(tmp_path / "one")
    with opened(store, run) as replica, Lease.acquire(run, 60.0) as lease:
        replica.bring_up()
        found = read_head(store, NAME)
        assert found is not None
        winner = replace(found[0], generation=2, token="f" * 16, holder=machine("b"))
        store.put(head_key(NAME), winner.to_bytes(), "any")
        write(run, "checkpoints/step-00000020/manifest.json", b"too late")
        replica.start()
        replica._thread.join(10.0)
        assert not replica._thread.is_alive()
        with pytest.raises(LeaseLostError):
            lease.check()
        after = read_head(store, NAME)
        assert after is not None
        assert after[0].tree == found[0].tree


def test_a_list_that_is_old_takes_nothing_away(tmp_path: Path) -> None:
    store, run = OldLists(), new_run(tmp_path / "one")
    with opened(store, run) as replica:
        replica.bring_up()
        store.stop_listing()
        checkpoint(run, 20, LARGE)
        replica.finish(1.0)
    for host in ("b", "c"):
        other = RunDirectory(tmp_path / host / NAME)
        with opened(store, other, host) as replica:
            assert contents(other) == contents(run)
            replica.finish(1.0)


def test_an_outage_is_waited_for(tmp_path: Path) -> None:
    store, run = Outage(), new_run(tmp_path)
    told: list[str] = []
    with opened(store, run) as replica:
        replica.tell = told.append
        replica.bring_up()
        store.is_down = True
        write(run, "checkpoints/step-00000020/manifest.json", b'{"step": 20}')
        threading.Timer(1.0, setattr, (store, "is_down", False)).start()
        replica.start()
        replica.finish(10.0)
    other = RunDirectory(tmp_path / "two" / NAME)
    with opened(store, other, "b"):
        assert contents(other) == contents(run)


def test_an_outage_at_the_end_says_where_the_run_is(tmp_path: Path) -> None:
    store, run = Outage(), new_run(tmp_path)
    with opened(store, run) as replica:
        replica.bring_up()
        store.is_down = True
        write(run, "evaluation.json", b"{}")
        with pytest.raises(StorageError, match="It is whole on this machine"):
            replica.finish(0.0)
        store.is_down = False


def test_a_bit_that_flips_on_the_way_is_seen(tmp_path: Path) -> None:
    store, run = Outage(), new_run(tmp_path / "one")
    store.is_flipping = True
    with opened(store, run) as replica, pytest.raises(StorageError, match="cannot be read back"):
        replica.bring_up()
    store.is_flipping = False
    with opened(store, run) as replica:
        replica.finish(1.0)
    store.is_flipping = True
    other = RunDirectory(tmp_path / "two" / NAME)
    with pytest.raises(StorageError, match="was altered"), opened(store, other, "b"):
        pass
    assert not other.path.exists()


class Slow(MemoryObjects):
    """A bucket that needs some time for each part, and remembers in which order heads came."""

    part_s = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.trees: list[str] = []

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        if key == head_key(NAME):
            self.trees.append(str(json.loads(content)["tree"]))
        elif len(content) > LARGE:
            time.sleep(self.part_s)
        return super().put(key, content, expected)

    def upload(self, key: str, parts: Iterable[Bytes]) -> None:
        def slowly() -> Iterator[Bytes]:
            for part in parts:
                time.sleep(self.part_s)
                yield part

        super().upload(key, slowly())


def checkpoint(run: RunDirectory, step: int, size_bytes: int) -> None:
    write(run, f"checkpoints/step-{step:08d}/model.safetensors", os.urandom(size_bytes))


def test_a_slow_bucket_gets_the_newest_state_skips_others_and_is_one_behind_at_most(
    tmp_path: Path,
) -> None:
    store, run = Slow(), new_run(tmp_path)
    store.part_s = 0.4
    behind = []
    with opened(store, run) as replica:
        replica.start()
        for step in range(20, 60):
            checkpoint(run, step, LARGE + 1)
            shutil.rmtree(run.checkpoint(step - 2), ignore_errors=True)
            time.sleep(0.05)
            found = read_head(store, NAME)
            assert found is not None
            behind.append((step, found[0].tree))
        replica.finish(5.0)
    num_states = len({tree for _, tree in behind if tree})
    assert 2 <= num_states < 20  # of 40: the others were over
    numbers = [int(tree.split("/")[-2]) for tree in store.trees if tree != "None"]
    assert numbers == sorted(numbers)  # never an older one after a newer one
    assert run.checkpoint(59).is_dir()
    other = RunDirectory(tmp_path / "two" / NAME)
    with opened(store, other, "b"):
        assert contents(other) == contents(run)


@pytest.mark.parametrize(("patience_s", "is_given_up"), [(1.5, True), (60.0, False)])
def test_what_is_on_its_way_makes_way_for_the_newest_where_both_have_no_time(
    patience_s: float, is_given_up: bool, tmp_path: Path
) -> None:
    store, run = Slow(), new_run(tmp_path)
    with opened(store, run) as replica:
        replica.bring_up()
        replica.bytes_per_s = 10.0 * LARGE
        store.part_s = 0.25
        for number in range(24):  # 2.4 s at the speed that was measured
            write(run, f"checkpoints/step-00000020/{number}", os.urandom(LARGE + 1))
        replica.start()
        while replica._sending is None:
            time.sleep(0.01)
        shutil.rmtree(run.checkpoint(20))
        for number in range(8):
            write(run, f"checkpoints/step-00000030/{number}", os.urandom(LARGE + 1))
        replica.finish(patience_s, is_urgent=True)
    found = read_head(store, NAME)
    assert found is not None
    assert found[0].tree is not None
    assert "/000003/" in found[0].tree
    assert any("/000002/" in tree for tree in store.trees) != is_given_up
    other = RunDirectory(tmp_path / "two" / NAME)
    with opened(store, other, "b"):
        assert contents(other) == contents(run)


def test_an_image_is_the_folder_at_one_moment(tmp_path: Path) -> None:
    """Steps are added before older ones are taken away: an image never lacks both."""
    run, should_stop = RunDirectory(tmp_path / NAME), threading.Event()

    def train() -> None:
        step = 0
        while not should_stop.wait(0.001):
            step += 1
            write(run, f"checkpoints/step-{step:08d}/manifest.json", str(step).encode())
            for old in sorted(run.checkpoints.iterdir())[:-2]:
                (old / "manifest.json").unlink()
                old.rmdir()

    writer = threading.Thread(target=train)
    writer.start()
    num_taken = 0
    try:
        for _ in range(100):
            try:
                image = take_image(run.path, tmp_path / "image")
            except StorageError:
                continue
            steps = sorted(int(link.read_bytes()) for link in image.links.values())
            assert steps in ([], [*range(steps[0], steps[-1] + 1)] if steps else [])
            assert len(steps) <= 3
            num_taken += len(steps) > 0
    finally:
        should_stop.set()
        writer.join()
    assert num_taken > 10


def test_links_devices_and_files_on_their_way_are_left_out(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / "secret").symlink_to("/etc/passwd")
    os.mkfifo(run.path / "fifo")
    write(run, ".hidden", b"x")
    write(run, ".staging/1/x", b"x")
    for number in (1, 2, 3):
        write(run, f"lease/{number:08d}.json", b"{}")
    assert set(look_at(run.path)) == {
        "run.json",
        "checkpoints/step-00000010/manifest.json",
        "checkpoints/step-00000010/model.safetensors",
        "losses/0001-1",
        "lease/00000003.json",
    }


FILE = {"size_bytes": 1, "digest": digest_of([b"x"]), "text": "x"}


@pytest.mark.parametrize(
    "files",
    [
        {"../run.json": FILE},
        {"/etc/passwd": FILE},
        {"a/./b": FILE},
        {"a//b": FILE},
        {"a\nb": FILE},
        {"a": FILE, "a/b": FILE},
        {"a": {**FILE, "digest": "md5:0"}},
        {"a": {**FILE, "size_bytes": 2}},
        {"a": {**FILE, "size_bytes": -1}},
        {"a": {"size_bytes": 1, "digest": FILE["digest"], "key": "runs/other/run/x"}},
        {"a": {"size_bytes": 1, "digest": FILE["digest"], "key": f"runs/{NAME}/../../x"}},
        {"a": {"size_bytes": 1, "digest": FILE["digest"], "base64": "not base 64"}},
        {"a": []},
    ],
)
def test_a_tree_that_nobody_of_ours_wrote_is_refused(files: dict[str, object]) -> None:
    content = json.dumps({"format_version": 1, "files": files}).encode()
    with pytest.raises(DataFormatError):
        parse_tree(content, "tree.json", run_folder(NAME))


def test_a_tree_is_read_as_it_was_written() -> None:
    store = MemoryObjects()
    tree = Tree(
        {
            "run.json": TreeFile(1, digest_of([b"x"]), inline=b"x"),
            "losses/1": TreeFile(2, digest_of([b"\xff\x00"]), inline=b"\xff\x00"),
            "a/b": TreeFile(9, digest_of([b"y"]), key=f"{run_folder(NAME)}/k"),
        }
    )
    store.put("tree", tree.to_bytes(), "any")
    assert read_tree(store, "tree", digest_of([tree.to_bytes()]), run_folder(NAME)) == tree
    with pytest.raises(DataFormatError, match="was altered"):
        read_tree(store, "tree", digest_of([b"other"]), run_folder(NAME))
