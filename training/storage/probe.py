"""Is a server fit for a store? Its behaviour is tried, on throw-away objects; versions say little.

Several imitations of S3 take conditional writes for plain ones, answer 200 and overwrite: two
machines would then both be the writer of a run.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from holdfast.training.errors import InputError, StorageError
from holdfast.training.storage.protocol import ObjectStore, Unchanged

FOLDER = "probe"
NUM_RACES = 20
MARK_KEY = "fit.json"


def probe(store: ObjectStore, num_races: int = NUM_RACES) -> list[str]:
    """What a server does otherwise than a writer needs, in words; empty where it is fit.

    What was written is deleted again. Raises StorageError or InputError where it does not answer.
    """
    _require_bucket(store)
    found: list[str] = []
    keys: list[str] = []

    def key() -> str:
        keys.append(f"{FOLDER}/{secrets.token_hex(8)}.json")
        return keys[-1]

    try:
        for examine in (_creates, _swaps, _lists, _reads_ranges):
            found += examine(store, key)
            if found:
                return found  # what is decided is not tried twenty times
        return _races(store, key, num_races)
    finally:
        _clear(store, keys)


def require_fit(store: ObjectStore, name: str) -> None:
    """Make sure that runs can be written here; asked once for each store, which keeps the answer.

    Raises InputError for a server that is not fit, StorageError for one that does not answer.
    """
    known = store.get(MARK_KEY)
    if known is not None:
        return
    if wrong := probe(store):
        raise InputError(
            f"{name} is not fit for writing runs: {wrong[0]}; take a bucket whose server has "
            "conditional writes, or a folder. What lies there can still be read"
        )
    store.put(MARK_KEY, _content(), "absent")


def server_time_s(store: ObjectStore) -> float:
    """The server's clock, Unix time, by an object that is written now.

    Raises StorageError or InputError where it does not answer.
    """
    key = f"{FOLDER}/{secrets.token_hex(8)}.json"
    _require_bucket(store)
    store.put(key, _content(), "any")
    try:
        written = [entry for entry in store.list(FOLDER) if entry.key == key]
        if not written:
            raise StorageError("the store does not list what was just written; try later")
        return written[0].modified_s
    finally:
        _clear(store, [key])


def _require_bucket(store: ObjectStore) -> None:
    """Raise InputError where there is no bucket: some servers make it at the first write."""
    store.get(MARK_KEY)


def _content() -> bytes:
    return json.dumps({"nonce": secrets.token_hex(8)}).encode()


def _creates(store: ObjectStore, key: Callable[[], str]) -> list[str]:
    name, first = key(), _content()
    if store.put(name, first, "absent") is None:
        return ["it does not let a new object be made on condition that there is none"]
    if store.put(name, _content(), "absent") is not None:
        return ["it overwrites an object that was to be made only if there is none"]
    found = store.get(name)
    return [] if found and found.content == first else ["a refused write has changed the object"]


def _swaps(store: ObjectStore, key: Callable[[], str]) -> list[str]:
    name = key()
    stale = store.put(name, _content(), "absent")
    assert stale is not None
    second = _content()
    tag = store.put(name, second, Unchanged(stale))
    if tag is None:
        return ["it refuses to replace an object on condition that it is unchanged"]
    if store.put(name, _content(), Unchanged(stale)) is not None:
        return ["it replaces an object on a condition that does not hold (If-Match is ignored)"]
    found = store.get(name)
    is_same = found is not None and found.content == second and found.tag == tag
    return [] if is_same else ["what was written last is not what is read"]


def _lists(store: ObjectStore, key: Callable[[], str]) -> list[str]:
    name = key()
    store.put(name, _content(), "any")
    if name not in [entry.key for entry in store.list(FOLDER)]:
        return ["an object that was just written is not listed"]
    try:
        store.delete([name])
    except StorageError:
        return []  # rights to delete may be missing: a run ends well without, and tells it
    if store.get(name) is not None or name in [entry.key for entry in store.list(FOLDER)]:
        return ["an object that was just deleted is still there"]
    return []


def _reads_ranges(store: ObjectStore, key: Callable[[], str]) -> list[str]:
    name = key()
    store.put(name, b"0123456789", "any")
    try:
        found = store.get(name, 3, 7)
    except StorageError:
        found = None
    return [] if found and found.content == b"3456" else ["it does not give a part of an object"]


def _races(store: ObjectStore, key: Callable[[], str], num_races: int) -> list[str]:
    """Two that make the same object at once: one must win, each time."""
    with ThreadPoolExecutor(2) as pool:
        for _ in range(num_races):
            name, start = key(), Barrier(2)

            def create(name: str = name, start: Barrier = start) -> bool:
                start.wait()
                return store.put(name, _content(), "absent") is not None

            won = [future.result() for future in [pool.submit(create) for _ in range(2)]]
            if won.count(True) != 1:
                return [f"of two that made one object at once {won.count(True)} succeeded"]
    return []


def _clear(store: ObjectStore, keys: list[str]) -> None:
    try:
        store.delete(keys)
    except StorageError:
        return  # rights to delete may be missing; the probe's objects are small
