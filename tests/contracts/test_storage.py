"""One battery for every Storage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.manifest import MANIFEST_NAME, FileEntry
from holdfast.training.checkpointing.snapshot import FileImage
from holdfast.training.checkpointing.storage import LocalStorage, Storage
from holdfast.training.errors import (
    CheckpointCorruptError,
    LeaseLostError,
    StorageError,
    StorageFullError,
)
from tests.contracts.memory_storage import MemoryStorage

HUGE_BYTES = 2**62


class HugeImage(FileImage):
    """Claims a size that no machine has."""

    @property
    def size_bytes(self) -> int:
        return HUGE_BYTES


@dataclass
class Tenancy:
    """A lease that a test can take away."""

    is_lost: bool = False

    def check(self) -> None:
        if self.is_lost:
            raise LeaseLostError("another one writes now")


def local_storage(folder: Path, tenancy: Tenancy) -> Storage:
    staging = folder / ".staging"
    staging.mkdir()
    return LocalStorage(folder / "checkpoints", staging, tenancy.check)


def memory_storage(folder: Path, tenancy: Tenancy) -> Storage:
    return MemoryStorage(tenancy.check)


STORAGES: dict[str, Callable[[Path, Tenancy], Storage]] = {
    "local": local_storage,
    "memory": memory_storage,
}


@pytest.fixture
def tenancy() -> Tenancy:
    return Tenancy()


@pytest.fixture(params=list(STORAGES))
def storage(request: pytest.FixtureRequest, tmp_path: Path, tenancy: Tenancy) -> Storage:
    return STORAGES[request.param](tmp_path, tenancy)


def manifest_of(entries: Mapping[str, FileEntry]) -> bytes:
    return json.dumps({name: entry.model_dump() for name, entry in entries.items()}).encode()


def put(storage: Storage, name: str, **files: bytes) -> None:
    images = {f"{stem}.json": FileImage([data[:2], data[2:]]) for stem, data in files.items()}
    storage.commit(name, images, manifest_of)


def read(storage: Storage, name: str, file: str) -> bytes:
    content, digest = storage.folder(name).read(file, "blake3", None)
    data = content.numpy().tobytes()
    assert digest == digest_of([data])
    return data


def test_a_new_storage_is_empty(storage: Storage) -> None:
    assert storage.names() == []
    assert storage.folder("a").files == frozenset()


def test_what_was_committed_can_be_read(storage: Storage) -> None:
    put(storage, "a", one=b"first", two=b"")
    assert storage.names() == ["a"]
    assert storage.folder("a").files == {"one.json", "two.json", MANIFEST_NAME}
    assert read(storage, "a", "one.json") == b"first"
    assert read(storage, "a", "two.json") == b""


def test_the_manifest_is_made_from_sizes_and_digests(storage: Storage) -> None:
    put(storage, "a", one=b"first")
    entry = json.loads(read(storage, "a", MANIFEST_NAME))["one.json"]
    assert entry == {"size_bytes": 5, "digest": digest_of([b"first"])}


def test_a_second_commit_takes_the_place_of_the_first(storage: Storage) -> None:
    put(storage, "a", one=b"first", two=b"x")
    put(storage, "a", one=b"second")
    assert storage.names() == ["a"]
    assert storage.folder("a").files == {"one.json", MANIFEST_NAME}
    assert read(storage, "a", "one.json") == b"second"


def test_names_are_sorted(storage: Storage) -> None:
    for name in ("c", "a", "b"):
        put(storage, name, one=b"x")
    assert storage.names() == ["a", "b", "c"]


def test_a_commit_that_fails_leaves_nothing(storage: Storage) -> None:
    def fail(entries: Mapping[str, FileEntry]) -> bytes:
        raise StorageError("no")

    put(storage, "a", one=b"first")
    for name in ("a", "b"):
        with pytest.raises(StorageError, match="no"):
            storage.commit(name, {"one.json": FileImage([b"second"])}, fail)
    assert storage.names() == ["a"]
    assert read(storage, "a", "one.json") == b"first"
    put(storage, "b", one=b"third")
    assert read(storage, "b", "one.json") == b"third"


def test_what_cannot_fit_is_refused_with_both_numbers(storage: Storage) -> None:
    put(storage, "a", one=b"first")
    with pytest.raises(StorageFullError, match=r"\d+ are free") as caught:
        storage.commit("b", {"one.json": HugeImage([b"x"])}, manifest_of)
    assert caught.value.needed_bytes > caught.value.free_bytes > 0
    assert storage.names() == ["a"]


def test_amending_replaces_the_manifest_and_drops_the_rest(storage: Storage) -> None:
    put(storage, "a", one=b"first", two=b"second")
    storage.amend("a", b"new", frozenset({"one.json"}))
    assert storage.folder("a").files == {"one.json", MANIFEST_NAME}
    assert read(storage, "a", MANIFEST_NAME) == b"new"
    assert read(storage, "a", "one.json") == b"first"


def test_what_is_removed_is_gone(storage: Storage) -> None:
    put(storage, "a", one=b"first")
    put(storage, "b", one=b"second")
    storage.remove("a")
    assert storage.names() == ["b"]
    put(storage, "a", one=b"third")
    assert read(storage, "a", "one.json") == b"third"


def test_what_is_set_aside_keeps_its_bytes(storage: Storage) -> None:
    put(storage, "a", one=b"first")
    storage.remove("a", keep_as="a.damaged-1")
    assert storage.names() == ["a.damaged-1"]
    assert read(storage, "a.damaged-1", "one.json") == b"first"


@pytest.mark.parametrize("file", ["gone.json", "sub/gone.json"])
def test_a_missing_file_is_named(storage: Storage, file: str) -> None:
    put(storage, "a", one=b"first")
    with pytest.raises(CheckpointCorruptError, match=f"{file} is missing"):
        storage.folder("a").read(file, "blake3", None)


def test_a_file_of_another_size_is_refused_with_both_sizes(storage: Storage) -> None:
    put(storage, "a", one=b"first")
    with pytest.raises(CheckpointCorruptError, match="has 5 bytes, the manifest says 7"):
        storage.folder("a").read("one.json", "blake3", 7)


@pytest.mark.parametrize("action", ["remove", "amend"])
def test_what_is_not_there_cannot_be_changed(storage: Storage, action: str) -> None:
    with pytest.raises(StorageError):
        act(storage, action, "gone")
    assert storage.names() == []


def act(storage: Storage, action: str, name: str) -> None:
    if action == "commit":
        put(storage, name, one=b"other")
    elif action == "amend":
        storage.amend(name, b"other", frozenset())
    else:
        storage.remove(name, keep_as="b" if action == "set aside" else None)


@pytest.mark.parametrize("action", ["commit", "amend", "remove", "set aside"])
def test_a_writer_that_was_replaced_changes_nothing(
    storage: Storage, tenancy: Tenancy, action: str
) -> None:
    put(storage, "a", one=b"first")
    manifest = read(storage, "a", MANIFEST_NAME)
    tenancy.is_lost = True
    with pytest.raises(LeaseLostError):
        act(storage, action, "a")
    assert storage.names() == ["a"]
    assert storage.folder("a").files == {"one.json", MANIFEST_NAME}
    assert read(storage, "a", "one.json") == b"first"
    assert read(storage, "a", MANIFEST_NAME) == manifest
