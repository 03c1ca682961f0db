"""JSON files that are either wholly there or not there at all, whatever kills the process.

This module imports the standard library and the error tree alone: the command line reads run
directories with it and must start fast.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.training.errors import StorageError, StorageFullError

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import Json

FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
NO_LINK_ERRNOS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def json_bytes(value: Json) -> bytes:
    """The one way in which a value is written: sorted keys, two blanks, a line feed at the end.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def without_nan(value: Any) -> Any:
    """The value with words for its NaN and infinite numbers: ``"nan"``, ``"inf"``, ``"-inf"``.

    JSON has none of them; a metric may be any. ``float`` and pydantic read the words back.
    """
    if isinstance(value, float) and value - value != 0.0:
        return repr(value)
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return value


def write_json_durably(path: Path, value: Json) -> None:
    """Replace the file by ``value``. After return it is on disk; before that the old one is.

    The parent folder must exist. Raises StorageError, or StorageFullError for a full disk; then
    the old file is still there and no temporary one is left.
    """
    _write_durably(path, json_bytes(value), os.replace)


def create_json_durably(path: Path, value: Json) -> bool:
    """Write ``value`` unless the file exists; of several callers at once exactly one writes.

    Returns whether this call wrote it. Raises StorageError as ``write_json_durably`` does.
    """
    if path.exists():
        return False  # not even a temporary file: who only looks may have no leave to write
    try:
        _write_durably(path, json_bytes(value), _link_then_unlink)
    except FileExistsError:
        return False
    except StorageError as error:
        raise without_links(path, error) or error from error.__cause__
    return True


def without_links(path: Path, error: OSError) -> StorageError | None:
    """What to say where a link failed because the file system has none; None where it has."""
    cause = error.__cause__ if isinstance(error, StorageError) else error
    if not isinstance(cause, OSError) or cause.errno not in NO_LINK_ERRNOS:
        return None
    return StorageError(
        f"the file system of {path} has no hard links ({cause.strerror}), which it needs so that "
        f"exactly one of several writers wins: put the store on one that has"
    )


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename or a new name in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allowed_mode(mode: int) -> int:
    """What the umask leaves of a file's or folder's mode, for those that are made otherwise."""
    return mode & ~_umask()


def _umask() -> int:
    try:
        for line in (
            Path("/proc/self/status").read_text(encoding="ascii", errors="replace").split("\n")
        ):
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass  # another system than Linux
    found = os.umask(0o077)  # it cannot be asked for in another way
    os.umask(found)
    return found


def storage_error(action: str, path: Path, error: OSError, needed_bytes: int = 0) -> StorageError:
    """The typed error for a failed file operation; a full disk becomes a StorageFullError."""
    if error.errno not in FULL_ERRNOS:
        return StorageError(f"cannot {action} {path}: {error.strerror or error}")
    free_bytes = _free_bytes(path)
    return StorageFullError(
        f"cannot {action} {path}: {error.strerror}; {needed_bytes} bytes are needed and "
        f"{free_bytes} are free: make room and go on",
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
    )


def _write_durably(path: Path, content: bytes, publish: Callable[[Path, Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error("write", path, error, len(content)) from error


def _link_then_unlink(temporary: Path, path: Path) -> None:
    # rename() replaces silently; link() refuses, which is what makes one writer of many win.
    os.link(temporary, path)


def _free_bytes(path: Path) -> int:
    try:
        statistics = os.statvfs(path.parent)
    except OSError:
        return 0
    return statistics.f_bavail * statistics.f_frsize
