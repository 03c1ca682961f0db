"""What a store of objects has to do: five methods, held to one battery in ``tests/contracts/``.

A key is a path below the store's prefix, such as ``heads/digits/first.json``. An object is whole or
absent. A tag stands for one version of an object, and is compared for equality alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Bytes = bytes | bytearray | memoryview
PART_BYTES = 8 * 2**20
"""Of an upload and of a download: a part is sent again as a whole where it fails."""


@dataclass(frozen=True)
class Object:
    """What a read gave: the bytes, and the version that they are of."""

    content: bytes
    tag: str


@dataclass(frozen=True)
class Listed:
    """One object of a list.

    Attributes:
        tag: empty where the list does not tell it as a read does.
        modified_s: when it was written, Unix time on the server's clock.
    """

    key: str
    size_bytes: int
    tag: str
    modified_s: float


@dataclass(frozen=True)
class Unchanged:
    """A condition of a write: the object is still the version with this tag."""

    tag: str


Listing = list[Listed]
Expected = Literal["absent", "any"] | Unchanged


class ObjectStore(Protocol):
    """Objects by key. Safe to use from several threads; not after ``fork``.

    Each method tries again by itself what may pass, within a limit of time. After it, all raise
    StorageError with the action, the key and the server's status, and nothing of the address's
    query or of the credentials. Calls may take as long as that limit: none belongs into the thread
    that trains, whose signal handlers would wait for it.
    """

    has_checksums: bool
    """Whether the server compares what ``upload`` sends with a digest that is sent along."""

    def get(self, key: str, start: int = 0, end: int | None = None) -> Object | None:
        """The bytes from ``start`` to before ``end``; None where there is no such object."""
        ...

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        """Write a small object if what is expected holds; its tag, or None where it does not hold.

        Two writers' contents must differ, be it by a nonce: where the answer to a write was lost,
        the object is read, and with the same bytes it was this write that made it.
        """
        ...

    def upload(self, key: str, parts: Iterable[Bytes]) -> None:
        """Write an object of any size, whatever is there. Absent until it is whole.

        ``parts`` are asked for one after the other, none larger than ``PART_BYTES``, and several
        are under way at once.
        """
        ...

    def list(self, prefix: str) -> Listing:
        """All objects below a folder (``heads`` or ``heads/digits``), sorted by key."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error."""
        ...
