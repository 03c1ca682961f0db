"""Changing a run's files as its writer: by a rename out of the lease's staging folder, or into it.

A holder that was replaced no longer has that folder, so each of these ends with LeaseLostError and
changes nothing, however long ago the lease was looked at.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.training.errors import HoldfastError
from holdfast.training.runs.durable_json import json_bytes, storage_error, sync_folder
from holdfast.training.runs.lease import Lease


def publish_json(lease: Lease, path: Path, value: Any) -> None:
    """Replace a JSON file of the run. Raises as ``publish_bytes`` does."""
    publish_bytes(lease, path, json_bytes(value))


def publish_bytes(lease: Lease, path: Path, content: bytes) -> None:
    """Replace a file of the run. After return it is on disk; before that the old one is.

    Raises StorageError, or LeaseLostError where another process writes this run now.
    """
    staged = lease.staging / path.name
    with _typed_errors(lease, path, len(content)):
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        lease.check()
        staged.replace(path)
        sync_folder(path.parent)


def take_away(lease: Lease, path: Path) -> None:
    """Delete a file or folder of the run: it vanishes with the lease's staging folder.

    Nothing happens where there is none. Raises as ``publish_bytes`` does.
    """
    with _typed_errors(lease, path):
        lease.check()
        try:
            path.rename(lease.staging / f"taken-{secrets.token_hex(4)}")
        except FileNotFoundError:
            lease.check()  # which of the two is missing?
            return
        sync_folder(path.parent)


@contextmanager
def _typed_errors(lease: Lease, path: Path, needed_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except HoldfastError:
        raise
    except OSError as error:
        lease.check()
        raise storage_error("change", path, error, needed_bytes) from error
