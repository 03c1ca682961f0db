"""The archive of a run's code: digested, written by the training, unpacked where the code is not.

``code/<digest>.zip`` holds the files, ``code/code.json`` names the newest archive and the file that
is run. A run that goes on with other code keeps both archives. Whoever may write to a store decides
what its workers run.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from holdfast.training.code.files import MAX_BYTES, MAX_FILES, CodeTooLargeError, travelling_files
from holdfast.training.errors import DataFormatError
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.fenced import publish_bytes, publish_json
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import (
    Kinds,
    read_json,
    read_plain_file,
    required_fields,
)

logger = logging.getLogger(__name__)

INDEX_NAME = "code.json"
INDEX: Kinds = {"digest": (str,), "entry": (str,)}
FORMAT_VERSION = 1
FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # of zip; the same files give the same bytes


def keep_code(run: RunDirectory, lease: Lease, entry: Path) -> None:
    """Keep the code of a script, or of an experiment's file, in the run; as its writer.

    What is too large, or cannot be read, is told and not kept: training goes on. Raises
    StorageError, or LeaseLostError.
    """
    try:
        files = travelling_files(entry)
    except CodeTooLargeError as error:
        logger.warning("the code does not travel with the run: %s", error)
        return
    except OSError as error:
        logger.warning(
            "the code does not travel with the run: %s", storage_error("read", entry, error)
        )
        return
    if not files:
        return
    digest = code_digest(files)
    if kept_code(run) == (digest, entry.name):
        return
    try:
        run.code.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error("make", run.code, error) from error
    publish_bytes(lease, _archive(run, digest), _packed(files))
    publish_json(lease, run.code / INDEX_NAME, index_json(digest, entry.name, files))


def index_json(digest: str, entry: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What ``code.json`` says."""
    return {
        "digest": digest,
        "entry": entry,
        "files": sorted(files),
        "format_version": FORMAT_VERSION,
    }


def kept_code(run: RunDirectory) -> tuple[str, str] | None:
    """Digest of the archive that a run keeps, and the file that is run; None where there is none.

    Raises DataFormatError for an index that Holdfast did not write.
    """
    path = run.code / INDEX_NAME
    try:
        index = required_fields(read_json(path), path, INDEX)
    except FileNotFoundError:
        return None
    digest, entry = str(index["digest"]), str(index["entry"])
    is_ours = digest.startswith("sha256:") and len(digest) == 71 and digest[7:].isalnum()
    if not is_ours or PurePosixPath(entry).name != entry:
        raise DataFormatError(f"{path} names no archive of code: move it away")
    return (digest, entry) if _archive(run, digest).is_file() else None


def unpack_code(run: RunDirectory, folder: Path) -> Path:
    """Unpack the code that a run keeps into an empty folder. Returns the file that is run.

    Raises DataFormatError where it is not what was kept, or there is none; StorageError.
    """
    kept = kept_code(run)
    if kept is None:
        raise DataFormatError(f"{run.path} keeps no code")
    digest, entry = kept
    path = _archive(run, digest)
    try:
        content, _ = read_plain_file(path, 2 * MAX_BYTES)
        files = _unpacked(content)
    except (zipfile.BadZipFile, ValueError, FileNotFoundError) as error:
        raise DataFormatError(f"{path} is no archive of code: {error}") from error
    if code_digest(files) != digest or entry not in files:
        raise DataFormatError(
            f"{path} was changed: its files have the digest {code_digest(files)}; nothing of it "
            f"is run: bring the code here, or move the archive away"
        )
    for name, data in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder / entry


def code_digest(files: Mapping[str, bytes]) -> str:
    """``sha256:...`` of names and contents."""
    lines = (f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n" for name in sorted(files))
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _archive(run: RunDirectory, digest: str) -> Path:
    return run.code / f"{digest.removeprefix('sha256:')}.zip"


def _packed(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, FIRST_DAY), files[name], zipfile.ZIP_DEFLATED)
    return content.getvalue()


def _unpacked(content: bytes) -> dict[str, bytes]:
    """Names and contents. Raises ValueError for what leads out of a folder, or is too much."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if len(members) > MAX_FILES or sum(one.file_size for one in members) > MAX_BYTES:
            raise ValueError("it holds more than is ever kept")
        files: dict[str, Any] = {}
        for one in members:
            parts = PurePosixPath(one.filename).parts
            is_inside = parts and ".." not in parts and not one.filename.startswith("/")
            if not is_inside or "\\" in one.filename or one.is_dir():
                raise ValueError(f"it names {one.filename!r}")
            with archive.open(one) as file:
                files[one.filename] = file.read(one.file_size + 1)
        return files
