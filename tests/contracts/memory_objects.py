"""An ObjectStore in memory: what every server should do, in the fewest lines."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Sequence

from holdfast.training.storage.protocol import (
    Bytes,
    Expected,
    Listed,
    Listing,
    Object,
    Unchanged,
)


class MemoryObjects:
    """Objects that vanish with the process."""

    has_checksums = False

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, str, float]] = {}
        self._mutex = threading.Lock()

    def get(self, key: str, start: int = 0, end: int | None = None) -> Object | None:
        with self._mutex:
            found = self._objects.get(key)
        return None if found is None else Object(found[0][start:end], found[1])

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        with self._mutex:
            found = self._objects.get(key)
            if expected == "absent" and found is not None:
                return None
            if isinstance(expected, Unchanged) and (found is None or found[1] != expected.tag):
                return None
            return self._write(key, content)

    def upload(self, key: str, parts: Iterable[Bytes]) -> None:
        content = b"".join(bytes(part) for part in parts)
        with self._mutex:
            self._write(key, content)

    def list(self, prefix: str) -> Listing:
        folder = f"{prefix}/" if prefix else ""
        with self._mutex:
            return [
                Listed(key, len(content), tag, modified_s)
                for key, (content, tag, modified_s) in sorted(self._objects.items())
                if key.startswith(folder)
            ]

    def delete(self, keys: Sequence[str]) -> None:
        with self._mutex:
            for key in keys:
                self._objects.pop(key, None)

    def _write(self, key: str, content: bytes) -> str:
        tag = hashlib.md5(content, usedforsecurity=False).hexdigest()
        self._objects[key] = (content, tag, time.time())
        return tag
