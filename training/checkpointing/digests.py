"""Digests of files, computed while bytes move.

BLAKE3 because it was the fastest cryptographic one where we measured (one core of an AMD EPYC with
SHA extensions: BLAKE3 7.5, SHA-256 2.1, BLAKE2b 1.4 GB/s): hashing must not take longer than
writing. A digest names its algorithm, ``blake3:...``, so that another one can be taken later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import blake3

from holdfast.training.errors import CheckpointCorruptError

Bytes = bytes | bytearray | memoryview
ALGORITHM = "blake3"
CHUNK_BYTES = 8 * 2**20


class Hasher(Protocol):
    """What ``hashlib`` and ``blake3`` have in common."""

    def update(self, data: Bytes, /) -> object:
        """Take in more bytes."""
        ...

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        ...


HASHERS: dict[str, Callable[[], Hasher]] = {"blake3": blake3.blake3, "sha256": hashlib.sha256}


def new_hasher(algorithm: str) -> Hasher:
    """A hasher by the name that digests begin with. Raises CheckpointCorruptError."""
    if algorithm not in HASHERS:
        raise CheckpointCorruptError(
            f"unknown digest algorithm {algorithm!r}; this Holdfast knows {sorted(HASHERS)}"
        )
    return HASHERS[algorithm]()


def file_parts(path: Path) -> Iterator[bytes]:
    """A file's bytes, ``CHUNK_BYTES`` at a time. Raises OSError."""
    with path.open("rb") as file:
        while part := file.read(CHUNK_BYTES):
            yield part


def digest_of(parts: Iterable[Bytes], algorithm: str = ALGORITHM) -> str:
    """The digest of some buffers, one after the other."""
    hasher = new_hasher(algorithm)
    for part in parts:
        hasher.update(part)
    return f"{algorithm}:{hasher.hexdigest()}"
