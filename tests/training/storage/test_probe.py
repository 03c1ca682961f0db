from __future__ import annotations

import pytest

from holdfast.training.errors import InputError
from holdfast.training.storage.probe import probe, require_fit
from holdfast.training.storage.protocol import Expected, Listing, Object, Unchanged
from tests.contracts.memory_objects import MemoryObjects


class IgnoresConditions(MemoryObjects):
    """As rclone's server: every write is taken."""

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        return super().put(key, content, "any")


class IgnoresSwaps(MemoryObjects):
    """As localbucket: it creates once, and replaces whatever is there."""

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        return super().put(key, content, "any" if isinstance(expected, Unchanged) else expected)


class CreatesTwiceInRaces(MemoryObjects):
    """Two creations of one object at once both succeed, from the second race on."""

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        num = len(self.list(""))
        return super().put(key, content, "any" if num > 4 else expected)


class ListsLate(MemoryObjects):
    _newest = ""

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        self._newest = key
        return super().put(key, content, expected)

    def list(self, prefix: str) -> Listing:
        return [entry for entry in super().list(prefix) if entry.key != self._newest]


class IgnoresRanges(MemoryObjects):
    def get(self, key: str, start: int = 0, end: int | None = None) -> Object | None:
        return super().get(key)


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        (IgnoresConditions(), "overwrites an object"),
        (IgnoresSwaps(), "If-Match is ignored"),
        (CreatesTwiceInRaces(), "of two that made one object at once 2"),
        (ListsLate(), "not listed"),
        (IgnoresRanges(), "does not give a part"),
    ],
)
def test_a_server_that_is_not_fit_is_found_out(store: MemoryObjects, expected: str) -> None:
    [found] = probe(store)
    assert expected in found
    with pytest.raises(InputError, match="is not fit for writing runs"):
        require_fit(store, "the store")
    assert store.get("fit.json") is None


def test_a_fit_server_is_asked_once() -> None:
    store = MemoryObjects()
    require_fit(store, "the store")
    [mark] = store.list("")
    require_fit(store, "the store")
    assert store.list("") == [mark]
