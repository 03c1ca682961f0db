"""Bytes on their way between this machine and a bucket, digested as they move."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from holdfast.training.checkpointing.digests import digest_of, file_parts, new_hasher
from holdfast.training.errors import DataFormatError, StorageError
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.storage.protocol import PART_BYTES, ObjectStore
from holdfast.training.tiers.tree import INLINE_BYTES, Tree, TreeFile, all_paths, parse_tree

RANGES_AT_ONCE = 8
MAX_ATTEMPTS = 3


class GoneError(StorageError):
    """An object is not there, though a head or a tree named it; by now another may count."""

    def __init__(self, key: str, named_by: str) -> None:
        super().__init__(
            f"{key} is gone, though the {named_by} names it: restore it from a backup of the "
            f"bucket, or begin anew under another name"
        )


class AlteredError(StorageError):
    """What came of an object is not what a tree names."""


def read_tree(
    store: ObjectStore,
    key: str,
    digest: str,
    folder: str,
    takes: Callable[[str], bool] = all_paths,
) -> Tree:
    """The tree that a head names. ``takes`` is as for ``parse_tree``.

    Raises GoneError, StorageError, or DataFormatError where it is not what the head says.
    """
    for _ in range(MAX_ATTEMPTS):
        found = store.get(key)
        if found is None:
            raise GoneError(key, "run's head")
        if digest_of([found.content]) == digest:
            return parse_tree(found.content, key, folder, takes)
    raise DataFormatError(f"{key} was altered: its digest is not the one that the head names")


def upload_file(
    store: ObjectStore, path: Path, key: str, before_part: Callable[[int], None] = lambda _: None
) -> TreeFile:
    """Bring a file into the bucket, and make sure that it is there as it is here.

    A small one goes into the tree instead. ``before_part`` is told the size of each part before it
    is sent, and may wait, or raise StorageError to give the upload up. Raises StorageError.
    """
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes <= PART_BYTES:  # what a file gains meanwhile comes with the next one
                content = file.read(size_bytes)
                return _upload_small(store, content, key, before_part)
            hasher = new_hasher("blake3")

            def parts() -> Iterator[bytes]:
                left_bytes = size_bytes
                while left_bytes > 0 and (part := file.read(min(PART_BYTES, left_bytes))):
                    left_bytes -= len(part)
                    hasher.update(part)
                    before_part(len(part))
                    yield part

            store.upload(key, parts())
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error("read", path, error) from error
    uploaded = TreeFile(size_bytes, f"blake3:{hasher.hexdigest()}", key)
    if not store.has_checksums:
        for _ in read_file(store, uploaded, MAX_ATTEMPTS):
            pass
    return uploaded


def _upload_small(
    store: ObjectStore, content: bytes, key: str, before_part: Callable[[int], None]
) -> TreeFile:
    digest = digest_of([content])
    if len(content) <= INLINE_BYTES:
        return TreeFile(len(content), digest, inline=content)
    before_part(len(content))
    store.put(key, content, "any")
    if not store.has_checksums:
        found = store.get(key)
        if found is None or found.content != content:
            raise StorageError(f"{key} was written and cannot be read back as it was written")
    return TreeFile(len(content), digest, key)


def download_file(
    store: ObjectStore,
    file: TreeFile,
    path: Path,
    *,
    is_durable: bool = True,
    before_part: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a file of a tree to ``path``, right and, where it ``is_durable``, flushed after return.

    ``before_part`` is told the size of each part, and may raise StorageError to give up. Raises
    GoneError, or StorageError where it cannot be had, or its bytes are other ones each time.
    """
    try:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            with path.open("wb", buffering=0) as written:
                try:
                    for part in read_file(store, file, 1, written.fileno()):
                        before_part(len(part))
                except AlteredError:
                    if attempt == MAX_ATTEMPTS:
                        raise
                    continue
                if is_durable:
                    os.fsync(written.fileno())
                return
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error("write", path, error, file.size_bytes) from error


def read_small_file(store: ObjectStore, file: TreeFile) -> bytes:
    """The bytes of a file of a tree. Raises GoneError, AlteredError, or StorageError."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return b"".join(read_file(store, file, 1))
        except AlteredError:
            if attempt == MAX_ATTEMPTS:
                raise
    raise AssertionError


def read_file(
    store: ObjectStore, file: TreeFile, num_attempts: int, place: int | None = None
) -> Iterator[bytes]:
    """The bytes of a file of a tree, in order, over several ranges at once.

    ``num_attempts`` above one is for those who only want to know whether they are right. With
    ``place``, a descriptor, each part is written there as soon as it comes.

    Raises GoneError, StorageError, or at the end AlteredError.
    """
    for attempt in range(1, num_attempts + 1):
        hasher, num_bytes = new_hasher("blake3"), 0
        for part in _parts(store, file, place):
            hasher.update(part)
            num_bytes += len(part)
            yield part
        if (num_bytes, f"blake3:{hasher.hexdigest()}") == (file.size_bytes, file.digest):
            return
        if attempt == num_attempts:
            raise AlteredError(
                f"{file.key} was altered: {num_bytes:,} bytes came with another digest than the "
                f"one of {file.size_bytes:,} bytes that was written"
            )


def _parts(store: ObjectStore, file: TreeFile, place: int | None) -> Iterator[bytes]:
    if not file.key:
        yield _placed(file.inline, 0, place)
        return

    def part(start: int, end: int | None) -> bytes:
        found = store.get(file.key, start, end)
        if found is None:
            raise GoneError(file.key, "tree")
        return _placed(found.content, start, place)

    if file.size_bytes <= PART_BYTES:
        yield part(0, None)
        return
    with ThreadPoolExecutor(RANGES_AT_ONCE, "holdfast-read") as pool:
        waiting: deque[Future[bytes]] = deque()
        for start in range(0, file.size_bytes, PART_BYTES):
            waiting.append(pool.submit(part, start, min(start + PART_BYTES, file.size_bytes)))
            if len(waiting) >= RANGES_AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _placed(content: bytes, start: int, place: int | None) -> bytes:
    """The same bytes, once they are written where they belong."""
    num_written = len(content) if place is None else 0
    while num_written < len(content):
        num_written += os.pwrite(place or 0, memoryview(content)[num_written:], start + num_written)
    return content


def is_same_file(path: Path, file: TreeFile) -> bool:
    """Whether a plain file of this machine has the bytes that a tree names. Raises OSError."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    return digest_of(file_parts(path)) == file.digest
