"""The index of stream files: which there are, their sizes and digests, and where samples lie.

It is built once, and kept in a folder of its own: ``.holdfast-index`` beside the files, or, where
that cannot be written, below this machine's scratch folder. Two files:

    index.json     version, and of each file its name, size, digest and number of samples
    places.npy     int64 [N, 2]: the place of each sample, the files one after the other
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.training.checkpointing.digests import file_parts
from holdfast.training.data.permutation import Int64Array
from holdfast.training.errors import DataFormatError, DataNotFoundError, StorageError
from holdfast.training.streams.formats import KINDS, as_places, kind_of
from holdfast.training.tiers.scratch import SCRATCH_VARIABLE, scratch_folder

VERSION = 1
FOLDER = ".holdfast-index"
INDEX, PLACES = "index.json", "places.npy"
DIGEST = "blake2b-256"
DIGEST_TEXT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StreamFile:
    """One file: its name below the place, and what it was when the index was made.

    Attributes:
        modified_ns: when it was changed last; 0 where it lies in a bucket.
    """

    name: str
    size_bytes: int
    digest: str
    num_samples: int
    modified_ns: int = 0


@dataclass(frozen=True)
class Index:
    """The files of a place, in the order of their names.

    Attributes:
        folder: where the index is kept.
        places_digest: of ``places.npy``.
    """

    files: tuple[StreamFile, ...]
    folder: Path
    places_digest: str

    @property
    def fingerprint(self) -> str:
        """A digest of names, sizes and contents of all files."""
        told = [[file.name, file.size_bytes, file.digest] for file in self.files]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def counts(self) -> Int64Array:
        """Samples of each file."""
        return np.array([file.num_samples for file in self.files], dtype=np.int64)

    def places(self) -> Int64Array:
        """The place of each sample, mapped into memory. Raises DataFormatError."""
        path = self.folder / PLACES
        try:
            found: Int64Array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataFormatError(_damaged(self.folder, str(error))) from error
        if found.shape != (int(self.counts.sum()), 2) or found.dtype != np.int64:
            raise DataFormatError(_damaged(self.folder, f"{PLACES} has another number of places"))
        return found


def local_index(place: Path) -> Index:
    """The index of a stream file, or of all below a folder; built where there is none.

    Files are compared by size and time of change with what the index says; one that was touched is
    digested again.

    Raises:
        DataNotFoundError: there is no stream file, or one that the index names is gone.
        DataFormatError: a file is damaged, was changed or added since, or the index is of another
            version.
        StorageError: the index cannot be written anywhere.
    """
    root, names = stream_names(place)
    for folder in _folders(place):
        if (found := read_index(folder)) is not None:
            _require_unchanged(found, root, names)
            return found
    paths = [root / name for name in names]
    files, places = [], [as_places([])]
    for name, path in zip(names, paths, strict=True):
        file, own = indexed(name, path, path.stat().st_mtime_ns)
        files.append(file)
        places.append(own)
    return kept(_folders(place), files, np.concatenate(places))


def indexed(name: str, path: Path, modified_ns: int) -> tuple[StreamFile, Int64Array]:
    """What the index says of one file, and the places of its samples. Raises DataFormatError."""
    kind = kind_of(name)
    assert kind is not None
    try:
        places, digest = kind.places(path), file_digest(path)
    except OSError as error:
        raise DataFormatError(f"{path} cannot be read: {error.strerror or error}") from error
    size_bytes = path.stat().st_size
    return StreamFile(name, size_bytes, digest, len(places), modified_ns), places


def kept(folders: Sequence[Path], files: Sequence[StreamFile], places: Int64Array) -> Index:
    """Write an index to the first folder that can be written, whole or not at all."""
    if not len(places):
        raise DataFormatError(f"{files[0].name} and the other stream files have no samples at all")
    problem: OSError | None = None
    for folder in folders:
        scratch = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}")
        try:
            scratch.mkdir(parents=True)
            np.save(scratch / PLACES, places, allow_pickle=False)
            told = {
                "digest": DIGEST,
                "files": [asdict(file) for file in files],
                "places": file_digest(scratch / PLACES),
                "version": VERSION,
            }
            (scratch / INDEX).write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
            with suppress(OSError):  # another process was faster, with the same bytes
                scratch.rename(folder)
        except OSError as error:
            problem = error
            continue
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        found = read_index(folder)
        assert found is not None, folder
        return found
    assert problem is not None
    raise StorageError(
        f"the index of the stream files cannot be kept in {folders[-1]}: {problem.strerror}; name "
        f"another folder in {SCRATCH_VARIABLE}"
    ) from problem


def read_index(folder: Path) -> Index | None:
    """The index that a folder keeps; None for none. Raises DataFormatError where it is damaged."""
    try:
        told: Any = json.loads((folder / INDEX).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataFormatError(_damaged(folder, str(error))) from error
    if not isinstance(told, dict) or told.get("version") != VERSION:
        version = told.get("version") if isinstance(told, dict) else None
        raise DataFormatError(
            f"{folder} is an index of version {version!r}, and this program reads {VERSION}: "
            f"delete it, and it is built anew"
        )
    try:
        files = tuple(StreamFile(**file) for file in told["files"])
        # Names of files on a scratch disk are made of them.
        if not all(DIGEST_TEXT.fullmatch(file.digest) for file in files):
            raise ValueError("a digest of it is none")
        found = Index(files, folder, told["places"])
        if file_digest(folder / PLACES) != found.places_digest:
            raise ValueError(f"{PLACES} has another digest")
    except (OSError, TypeError, LookupError, ValueError) as error:
        raise DataFormatError(_damaged(folder, str(error))) from error
    return found


def stream_names(place: Path) -> tuple[Path, list[str]]:
    """The folder and, below it, the names of all stream files. Raises DataNotFoundError."""
    if place.is_file():
        return place.parent, [place.name]
    found = [
        path.relative_to(place).as_posix()
        for path in place.rglob("*")
        if path.suffix.lower() in KINDS and path.is_file() and not _is_hidden(path, place)
    ]
    if not found:
        how = "has none" if place.is_dir() else "does not exist"
        raise DataNotFoundError(
            f"there are no stream files: {place} {how}; expected files that end with "
            f"{', '.join(KINDS)}"
        )
    return place, sorted(found)


def file_digest(path: Path) -> str:
    """Of a file's bytes. Raises OSError."""
    hasher = hashlib.blake2b(digest_size=32)
    for part in file_parts(path):
        hasher.update(part)
    return hasher.hexdigest()


def _require_unchanged(index: Index, root: Path, names: Sequence[str]) -> None:
    known = {file.name: file for file in index.files}
    if missing := sorted(known.keys() - set(names)):
        raise DataNotFoundError(
            f"{root / missing[0]} is missing, and the index {index.folder} has it: bring it back, "
            f"or delete the index, which makes it another data set"
        )
    if added := sorted(set(names) - known.keys()):
        raise DataFormatError(
            f"{root / added[0]} is not in the index {index.folder}: take it away, or delete the "
            f"index, which makes it another data set"
        )
    for name in names:
        path, file = root / name, known[name]
        found = path.stat()
        is_same = found.st_size == file.size_bytes
        if is_same and found.st_mtime_ns != file.modified_ns:
            is_same = file_digest(path) == file.digest
        if not is_same:
            raise DataFormatError(
                f"{path} was changed since its index was made: it has {found.st_size} bytes, the "
                f"index says {file.size_bytes} with digest {file.digest[:12]}…; bring it back, or "
                f"delete {index.folder}, which makes it another data set"
            )


def _folders(place: Path) -> list[Path]:
    """Where the index of a place is looked for and kept, the best first."""
    absolute = place.absolute()
    beside = absolute / FOLDER if place.is_dir() else absolute.with_name(f"{FOLDER}-{place.name}")
    digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
    return [beside, scratch_folder() / "streams" / digest / "index"]


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _damaged(folder: Path, problem: str) -> str:
    told = problem.splitlines()[0] if problem else "it is empty"
    return f"{folder} is no index of stream files, {told}: delete it, and it is built anew"
