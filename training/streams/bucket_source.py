"""Stream files of a bucket: downloaded when they are needed, and kept for a while.

Below the scratch folder of the address:

    index/                 as beside local files; it is kept in the bucket, too, in .holdfast-index
    files/<digest>.<kind>  a whole file, whose bytes were digested while they came
    files/<digest>.partial a download, which the next one goes on with
    files/<digest>.lock    held by the process that downloads; others wait for its file
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.training.checkpointing.digests import file_parts
from holdfast.training.errors import DataFormatError, DataNotFoundError, StorageError
from holdfast.training.runs.faultpoints import reach
from holdfast.training.storage.address import parse_address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import PART_BYTES, Listed, ObjectStore
from holdfast.training.streams.formats import KINDS, OpenFile, kind_of
from holdfast.training.streams.index import (
    FOLDER,
    INDEX,
    PLACES,
    Index,
    StreamFile,
    file_digest,
    indexed,
    kept,
    read_index,
)
from holdfast.training.tiers.scratch import SCRATCH_VARIABLE, store_folder

logger = logging.getLogger(__name__)

MAX_TRIES = 3


class BucketSource:
    """Files below an address.

    At most ``cache_bytes`` of them lie on the scratch disk, or the one file that is needed.

    Raises:
        DataNotFoundError: there is no stream file, or one that the index names is gone.
        DataFormatError: one is damaged, was changed or added since the index was made, or its bytes
            are not those that the index knows.
        StorageError: the bucket, or the scratch disk, does not do what it is asked.
    """

    def __init__(self, place: str, cache_bytes: int) -> None:
        self._address = parse_address(place)
        self._folder = store_folder(self._address) / "streams"
        self._cache_bytes = cache_bytes
        self._store: tuple[int, ObjectStore] | None = None
        try:
            self._files.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_scratch(self._files, error) from error
        listed = self._opened().list("")
        with self._locked("index"):
            self._receive_index({one.key: one.size_bytes for one in listed})
            files, found = self._stream_files(listed), read_index(self._index_folder)
            self.index: Index = self._built(files) if found is None else found
        self._require_unchanged(files)
        self._make_room()

    def open(self, number: int) -> OpenFile:
        """A file, downloaded where it is not there."""
        file = self.index.files[number]
        kind = kind_of(file.name)
        assert kind is not None
        for _ in range(MAX_TRIES):
            path = self._local(file)
            with suppress(FileNotFoundError):  # another process needed the room at this moment
                return kind.open(path)
        raise StorageError(
            f"{path} is deleted again and again before it can be opened: several processes share a "
            f"cache of {self._cache_bytes:,} bytes, which is too small for them: raise cache_bytes"
        )

    def named(self, number: int) -> str:
        """How a file is called."""
        return f"{self._address}/{self.index.files[number].name}"

    def __getstate__(self) -> dict[str, Any]:
        """A store is not to be used in another process."""
        return {**self.__dict__, "_store": None}

    @property
    def _files(self) -> Path:
        return self._folder / "files"

    @property
    def _index_folder(self) -> Path:
        return self._folder / "index"

    def _opened(self) -> ObjectStore:
        if self._store is None or self._store[0] != os.getpid():
            self._store = (os.getpid(), open_store(self._address))
        return self._store[1]

    def _stream_files(self, listed: Sequence[Listed]) -> list[Listed]:
        found = [
            one
            for one in listed
            if Path(one.key).suffix.lower() in KINDS
            and not any(part.startswith(".") for part in one.key.split("/"))
        ]
        if not found:
            raise DataNotFoundError(
                f"there are no stream files in {self._address}; expected objects that end with "
                f"{', '.join(KINDS)}"
            )
        return sorted(found, key=lambda one: one.key)

    def _receive_index(self, sizes: Mapping[str, int]) -> None:
        """Bring the bucket's index here, where it has one that is not here yet."""
        told = self._opened().get(f"{FOLDER}/{INDEX}") if f"{FOLDER}/{INDEX}" in sizes else None
        own = self._index_folder / INDEX
        if told is None or (own.exists() and own.read_bytes() == told.content):
            return
        scratch = self._folder / "index.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        (scratch / INDEX).write_bytes(told.content)
        self._download(f"{FOLDER}/{PLACES}", sizes.get(f"{FOLDER}/{PLACES}", 0), scratch / PLACES)
        with self._told_by_address(scratch, FOLDER):
            read_index(scratch)
        shutil.rmtree(self._index_folder, ignore_errors=True)
        scratch.rename(self._index_folder)

    def _built(self, files: Sequence[Listed]) -> Index:
        """Download each file once, note what is in it, and keep that in the bucket."""
        found, places = [], []
        for one in files:
            path = self._files / f"{hashlib.sha256(one.key.encode()).hexdigest()}.partial"
            path.unlink(missing_ok=True)
            self._download(one.key, one.size_bytes, path)
            with self._told_by_address(path, one.key):
                file, own = indexed(one.key, path, 0)
            path.rename(self._path(file))
            self._make_room(keep=self._path(file))
            found.append(file)
            places.append(own)
        index = kept([self._index_folder], found, np.concatenate(places))
        try:
            for name in (PLACES, INDEX):  # an index without places is none
                self._opened().upload(f"{FOLDER}/{name}", file_parts(index.folder / name))
        except StorageError as error:
            logger.warning(
                "the index of %s cannot be kept there, so that every machine has to read all files "
                "to make its own: %s",
                self._address,
                error,
            )
        return index

    def _require_unchanged(self, listed: Sequence[Listed]) -> None:
        """Compare names and sizes; bytes are digested as they come."""
        known = {file.name: file.size_bytes for file in self.index.files}
        found = {one.key: one.size_bytes for one in listed}
        for name in sorted(known.keys() | found.keys()):
            if known.get(name) == found.get(name):
                continue
            how = f"has {found.get(name)} bytes, and the index says {known.get(name)}"
            if name not in found:
                how = "is missing, and the index has it"
            elif name not in known:
                how = "is not in the index"
            kind = DataNotFoundError if name not in found else DataFormatError
            raise kind(
                f"{self._address}/{name} {how}: bring it back to what it was, or {self._way_out}"
            )

    @property
    def _way_out(self) -> str:
        return (
            f"delete the index, {self._address}/{FOLDER} and {self._index_folder}, which makes it "
            f"another data set"
        )

    @contextmanager
    def _told_by_address(self, path: Path, key: str) -> Iterator[None]:
        """Errors about a local copy as errors about the object."""
        try:
            yield
        except DataFormatError as error:
            told = str(error).replace(str(path), f"{self._address}/{key}")
            raise DataFormatError(told) from error

    def _path(self, file: StreamFile) -> Path:
        return self._files / f"{file.digest}{Path(file.name).suffix.lower()}"

    def _local(self, file: StreamFile) -> Path:
        """Where a file lies on this machine; one process downloads it, the others wait."""
        path = self._path(file)
        if not _is_used(path):
            with self._locked(file.digest):
                if not _is_used(path):
                    self._fetch(file, path)
                    self._make_room(keep=path)
        return path

    def _fetch(self, file: StreamFile, path: Path) -> None:
        partial = path.with_suffix(".partial")
        for _ in range(2):  # what was left over of an earlier download may be spoilt
            self._download(file.name, file.size_bytes, partial)
            if file_digest(partial) == file.digest:
                reach("download.before-rename")
                partial.rename(path)
                return
            partial.unlink()
        raise DataFormatError(
            f"{self._address}/{file.name} gives other bytes than its index knows (digest "
            f"{file.digest[:12]}…): it was changed; bring it back, or {self._way_out}"
        )

    def _download(self, key: str, size_bytes: int, path: Path) -> None:
        """Add what is missing of an object to a file. Raises StorageError, DataNotFoundError."""
        try:
            with path.open("ab") as stream:
                if stream.tell() > size_bytes:
                    stream.truncate(0)
                while stream.tell() < size_bytes:
                    end = min(stream.tell() + PART_BYTES, size_bytes)
                    part = self._opened().get(key, stream.tell(), end)
                    if part is None:
                        raise DataNotFoundError(
                            f"{self._address}/{key} is missing, and the index has it: bring it "
                            f"back, or {self._way_out}"
                        )
                    if not part.content:
                        break  # shorter than it was; its digest will tell
                    stream.write(part.content)
                    stream.flush()
                    reach("download.after-part")
        except (StorageError, DataNotFoundError):
            raise
        except OSError as error:
            raise _no_scratch(path, error) from error

    def _make_room(self, keep: Path | None = None) -> None:
        """Delete files that were not used for longest, until the rest is small enough."""
        with self._locked("room"):
            found = []
            for path in self._files.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if path.suffix not in (".lock", ".partial"):
                        found.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self._cache_bytes:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)  # whoever has it open reads on
                    total -= size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Held by one process of this machine; the kernel frees it when that is killed."""
        path = self._files / f"{name}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _no_scratch(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _is_used(path: Path) -> bool:
    """Whether a file is there; it counts as used now."""
    try:
        os.utime(path)
    except OSError:
        return False
    return True


def _no_scratch(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot keep stream files in {path}: {error.strerror or error}; name another folder in "
        f"{SCRATCH_VARIABLE}"
    )
