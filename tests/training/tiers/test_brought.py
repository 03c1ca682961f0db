"""Files that another machine brings up, as the holder of the head finds them; all in memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.training.runs.directory import SegmentRecord, utc_now, write_segment
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.protocol import PART_BYTES, Bytes, Listing
from holdfast.training.tiers.bandwidth import Throttle
from holdfast.training.tiers.brought import FOLDER, Brought, key_of, tell
from holdfast.training.tiers.head import HeadLease, read_head, run_folder
from holdfast.training.tiers.replica import Replica
from holdfast.training.tiers.scratch import run_name
from holdfast.training.tiers.transfer import read_tree, upload_file
from holdfast.training.tiers.tree import Tree, TreeFile
from tests.contracts.memory_objects import MemoryObjects
from tests.training.tiers.test_replica import NAME, write

SIZE = PART_BYTES + 1
OWN, OTHERS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SLOW = PART_BYTES / 60.0
AT_ONCE_S = 20.0


class Counted(MemoryObjects):
    """Tells what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.uploaded: list[str] = []
        self.num_lists = 0

    def upload(self, key: str, parts: Iterable[Bytes]) -> None:
        super().upload(key, parts)
        self.uploaded.append(key)

    def list(self, prefix: str) -> Listing:
        self.num_lists += 1
        return super().list(prefix)


class Held:
    """A run whose head is held here, and another machine that trains along."""

    def __init__(self, folder: Path, num_machines: int | None = 2, num_processes: int = 2) -> None:
        self.store, self.run = Counted(), RunDirectory(folder / NAME)
        record = SegmentRecord(
            number=1,
            started_at=utc_now(),
            host="",
            pid=1,
            num_processes=num_processes,
            num_machines=num_machines,
        )
        write(self.run, "run.json", b"{}")
        write_segment(self.run, record)
        self.head = HeadLease.acquire(self.store, run_name(self.run))
        self.folder = f"{run_folder(NAME)}/{self.head.head.folder}"
        self._num_brought = 0
        self._told: dict[str, TreeFile] = {}

    def save(self, step: int) -> None:
        for name in (OWN, OTHERS):
            write(self.run, f"checkpoints/step-{step:08d}/{name}", os.urandom(SIZE))

    def bring(self, step: int, content: bytes | None = None) -> TreeFile:
        """The other machine brings up what it has written."""
        path = f"checkpoints/step-{step:08d}/{OTHERS}"
        place = self.run.path.parent.parent / "of-the-other"
        place.write_bytes(content or (self.run.path / path).read_bytes())
        self._num_brought += 1
        key = key_of(self.folder, "other", self._num_brought, path)
        brought = upload_file(self.store, place, key)
        self.tell(step, brought)
        return brought

    def tell(self, step: int, brought: TreeFile) -> None:
        self._told[f"checkpoints/step-{step:08d}/{OTHERS}"] = brought
        tell(self.store, self.folder, "other", Tree(self._told))

    def tree(self) -> Tree:
        """What the head names; all of it is there, as it is here."""
        found = read_head(self.store, NAME)
        assert found is not None
        assert found[0].tree is not None
        assert found[0].tree_digest is not None
        tree = read_tree(self.store, found[0].tree, found[0].tree_digest, run_folder(NAME))
        for path, file in tree.files.items():
            there = self.store.get(file.key) if file.key else None
            content = file.inline if there is None else there.content
            assert content == (self.run.path / path).read_bytes()
        return tree

    def key(self, step: int, name: str = OTHERS) -> str:
        return self.tree().files[f"checkpoints/step-{step:08d}/{name}"].key


def test_what_another_machine_has_brought_up_is_named_and_not_sent(tmp_path: Path) -> None:
    held = Held(tmp_path)
    held.save(10)
    brought = held.bring(10)
    Replica(held.store, held.run, held.head).bring_up()
    assert held.key(10) == brought.key
    assert [OWN in key for key in held.store.uploaded] == [False, True]


@pytest.mark.parametrize(
    "what", ["other bytes", "nothing", "somewhere else", "no tree", "too soon"]
)
def test_what_is_told_and_is_not_so_is_sent_here(tmp_path: Path, what: str) -> None:
    held = Held(tmp_path)
    held.save(10)
    brought = held.bring(10, os.urandom(SIZE) if what == "other bytes" else None)
    told_at = f"{held.folder}/{FOLDER}/other.json"
    if what == "nothing":
        held.store.delete([brought.key])
    elif what == "somewhere else":
        held.tell(10, replace(brought, key=f"{run_folder(NAME)}/0/{OTHERS}"))
    elif what == "no tree":
        held.store.put(told_at, b"[", "any")
    elif what == "too soon":
        held.store.delete([told_at])
    start_s = time.monotonic()
    Replica(held.store, held.run, held.head).bring_up()
    assert f"/{FOLDER}/" not in held.key(10)
    assert time.monotonic() - start_s < AT_ONCE_S


def test_what_is_brought_up_meanwhile_is_given_up_here(tmp_path: Path) -> None:
    held = Held(tmp_path)
    held.save(10)
    write(held.run, f"checkpoints/step-00000010/{OWN}", b"small")
    replica = Replica(held.store, held.run, held.head, throttle=Throttle(SLOW))
    bringing = threading.Timer(1.0, held.bring, [10])
    bringing.start()
    start_s = time.monotonic()
    replica.bring_up()
    assert time.monotonic() - start_s < AT_ONCE_S
    assert f"/{FOLDER}/other/" in held.key(10)
    bringing.join()
    assert len(held.store.uploaded) == 1


def test_what_came_too_late_is_deleted_once_its_state_is_over(tmp_path: Path) -> None:
    held = Held(tmp_path)
    replica = Replica(held.store, held.run, held.head)
    held.save(10)
    replica.bring_up()
    late = held.bring(10)
    held.save(20)
    named = held.bring(20)
    replica.bring_up()
    assert held.key(20) == named.key
    replica._delete_dropped(older_than_s=0.0)
    left = {entry.key for entry in held.store.list(f"{held.folder}/{FOLDER}")}
    assert late.key not in left
    assert held.key(20) in left
    replica.finish(1.0)
    keys = {entry.key for entry in held.store.list(run_folder(NAME))}
    assert len(keys - held.tree().keys()) == 1, "the tree alone is named by no tree"


def test_what_nobody_else_has_is_sent_first_and_what_others_begin_with_last(
    tmp_path: Path,
) -> None:
    names = [f"model-0000{rank}-of-00004.safetensors" for rank in (1, 2, 3, 4)]
    several = Held(tmp_path / "several", num_processes=4)
    brought = Brought(several.store, several.run, several.folder)
    assert brought.in_order([*names, "ema.safetensors"]) == [
        *names[:2],
        "ema.safetensors",
        names[3],
        names[2],
    ]
    alone = Held(tmp_path / "alone", num_processes=4, num_machines=None)
    assert Brought(alone.store, alone.run, alone.folder).in_order(names) == names


def test_a_run_on_one_machine_asks_for_nothing(tmp_path: Path) -> None:
    held = Held(tmp_path, num_machines=None)
    held.save(10)
    replica = Replica(held.store, held.run, held.head)
    replica.finish(1.0)
    assert held.store.num_lists == 0
