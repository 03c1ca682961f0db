"""Files on a local disk: written, flushed, read back and read, with digests on the way.

Writing, hashing, flushing and reading back take the same bytes to four different parts of the
machine, so they run side by side in threads; all four let go of Python's lock.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from holdfast.training.checkpointing.digests import (
    ALGORITHM,
    CHUNK_BYTES,
    Bytes,
    digest_of,
    new_hasher,
)
from holdfast.training.device.reading import DeviceReader
from holdfast.training.errors import CheckpointCorruptError, StorageError
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.faultpoints import reach
from holdfast.training.runs.stored_json import NO_FOLLOW, kind_name

NUM_WRITER_THREADS = 3  # one hashes, one flushes, one reads back

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class WrittenFile:
    """A file that is written and on its way to being durable and verified."""

    path: Path
    size_bytes: int
    _digest: Future[str]
    _flush: Future[None]
    _read_back: Future[str]

    def digest(self) -> str:
        """The digest, once the file is durable and was read back.

        Raises OSError, or StorageError if other bytes came back than were written.
        """
        written, _, found = self._digest.result(), self._flush.result(), self._read_back.result()
        if written != found:
            raise StorageError(
                f"{self.path} was read back with digest {found}, {written} was written: the disk "
                f"or the memory of this machine is failing"
            )
        return written


class FileWriter:
    """Writes files one after the other while a pool of threads finishes the ones before."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def write(self, path: Path, parts: Sequence[Bytes]) -> WrittenFile:
        """Make the file with one write per part. Raises OSError; FileExistsError if it exists."""
        reach("write.before-file")
        digest = self._submit(digest_of, parts)
        # Mode as any program's files: the umask decides who may read it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            size_bytes = sum(_write_all(descriptor, memoryview(part)) for part in parts)
        except BaseException:
            os.close(descriptor)
            raise
        reach("write.after-file")
        return WrittenFile(
            path,
            size_bytes,
            digest,
            _flush=self._submit(_flush_and_close, descriptor),
            _read_back=self._submit(_read_back, path),
        )

    def _submit(self, work: Callable[..., ResultT], *arguments: Any) -> Future[ResultT]:
        try:
            return self._pool.submit(work, *arguments)
        except RuntimeError:  # the interpreter is leaving, and starts no thread any more
            done: Future[ResultT] = Future()
            try:
                done.set_result(work(*arguments))
            except Exception as error:  # noqa: BLE001  # told by whoever asks for the result
                done.set_exception(error)
            return done


def read_file(
    path: Path,
    algorithm: str,
    size_bytes: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
    max_bytes: int | None = None,
    device: DeviceReader | None = None,
) -> tuple[Tensor, str]:
    """The content of a file, uint8, and its digest.

    Args:
        path: the file.
        algorithm: of the digest.
        size_bytes: how large it must be; None for any size.
        on_bytes: told the size of each chunk that was read. With it the content is mapped rather
            than held in memory, which stays small however large the file is.
        max_bytes: how large it may be at most, where its size is not known.
        device: reads it into its memory, where the content is then. The digest is of what lies
            there; torch's RuntimeError says that it cannot.

    Raises:
        CheckpointCorruptError: it is missing, not a plain file, of another size, full of holes
            where the memory of this machine does not hold it, or the disk cannot give it back.
        StorageError: it cannot be read for another reason.
    """
    with _typed_errors(path), closing(_open_plain(path, size_bytes)) as file:
        found_bytes = os.fstat(file.fileno()).st_size
        if max_bytes is not None and found_bytes > max_bytes:
            raise CheckpointCorruptError(
                f"{path} has {found_bytes} bytes, at most {max_bytes} are expected"
            )
        if on_bytes is not None:
            return _digest_and_map(file, found_bytes, algorithm, on_bytes)
        if device is not None:
            hasher = new_hasher(algorithm)
            content, end = device.read(file, found_bytes, hasher.update)
            _require_end(file, end, found_bytes)
            return content, f"{algorithm}:{hasher.hexdigest()}"
        return _read_and_digest(file, found_bytes, algorithm)


def require_plain_file(path: Path, size_bytes: int) -> None:
    """Raise what ``read_file`` raises unless there is a plain file of this size."""
    with _typed_errors(path), closing(_open_plain(path, size_bytes)):
        pass


@contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointCorruptError(f"{path} is missing") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise CheckpointCorruptError(f"{path} cannot be read: {error.strerror}") from error
        raise storage_error("read", path, error) from error


def _read_and_digest(file: io.FileIO, num_bytes: int, algorithm: str) -> tuple[Tensor, str]:
    content = _memory_for(file, num_bytes)
    memory, hasher, end = content.numpy().data, new_hasher(algorithm), 0
    hashed = []
    with ThreadPoolExecutor(1) as pool:  # one thread: chunks are hashed in their order
        while num_read := file.readinto(memory[end : end + CHUNK_BYTES]):
            hashed.append(pool.submit(hasher.update, memory[end : end + num_read]))
            end += num_read
    for future in hashed:
        future.result()
    _require_end(file, end, num_bytes)
    return content, f"{algorithm}:{hasher.hexdigest()}"


def _require_end(file: io.FileIO, end: int, num_bytes: int) -> None:
    if end != num_bytes:
        raise CheckpointCorruptError(f"{file.name!s} ended at byte {end} of {num_bytes}")


def _memory_for(file: io.FileIO, num_bytes: int) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        # A file that was written holds its bytes; one that only claims a size is mostly a hole.
        on_disk_bytes = os.fstat(file.fileno()).st_blocks * 512
        message = f"{file.name!s} has {num_bytes} bytes, which the memory here does not hold"
        if on_disk_bytes < num_bytes // 2:
            raise CheckpointCorruptError(
                f"{message}; only {on_disk_bytes} of them are on the disk"
            ) from error
        raise StorageError(f"{message}: take a machine with more") from error


def _digest_and_map(
    file: io.FileIO, num_bytes: int, algorithm: str, on_bytes: Callable[[int], None]
) -> tuple[Tensor, str]:
    # Read, not mapped, for the digest: a disk that fails is an error then, and not a signal.
    hasher, buffer, end = new_hasher(algorithm), memoryview(bytearray(CHUNK_BYTES)), 0
    while num_read := file.readinto(buffer):
        hasher.update(buffer[:num_read])
        on_bytes(num_read)
        end += num_read
    _require_end(file, end, num_bytes)
    content = torch.empty(0, dtype=torch.uint8)
    if num_bytes:
        mapped = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_COPY)
        content = torch.frombuffer(mapped, dtype=torch.uint8)
    return content, f"{algorithm}:{hasher.hexdigest()}"


def _open_plain(path: Path, size_bytes: int | None) -> io.FileIO:
    kind = path.lstat().st_mode
    if not stat.S_ISREG(kind):
        raise CheckpointCorruptError(
            f"{path} should be a plain file and is {kind_name(kind)}; it was not made by Holdfast"
        )
    file = io.FileIO(path, "rb", opener=_open_without_waiting)
    found_bytes = os.fstat(file.fileno()).st_size
    if size_bytes is not None and found_bytes != size_bytes:
        file.close()
        raise CheckpointCorruptError(
            f"{path} has {found_bytes} bytes, the manifest says {size_bytes}"
        )
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | NO_FOLLOW)


def _write_all(descriptor: int, part: memoryview) -> int:
    reach("write.between")
    num_written = 0
    while num_written < len(part):  # Linux writes at most 2 GiB at once
        num_written += os.write(descriptor, part[num_written:])
    return num_written


def _flush_and_close(descriptor: int) -> None:
    try:
        reach("flush.before")
        os.fsync(descriptor)
        reach("flush.after")
    finally:
        os.close(descriptor)


def _read_back(path: Path) -> str:
    # From the page cache where the system keeps it there: what any reader would be given.
    reach("verify.before")
    hasher, buffer = new_hasher(ALGORITHM), memoryview(bytearray(CHUNK_BYTES // 8))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            hasher.update(buffer[:num_bytes])
    reach("verify.after")
    return f"{ALGORITHM}:{hasher.hexdigest()}"
