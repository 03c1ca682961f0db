"""Where a bundle is pulled from: one small protocol; a folder here, HTTP in ``http_store.py``.

Imports the standard library alone.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from holdfast.training.bundles import consumer
from holdfast.training.errors import BundleError
from holdfast.training.runs.shown_text import shown

CHUNK_BYTES = 1 << 20


class BundleSource(Protocol):
    """A bundle somewhere else. ``str()`` of it says where, for messages."""

    def manifest(self) -> dict[str, Any]:
        """The manifest, checked against its own digest. Raises BundleError."""
        ...

    def refuse_additions(self, manifest: Mapping[str, Any]) -> None:
        """Raises BundleError that names what is there and not in the manifest, where it shows."""
        ...

    def read(self, name: str, start: int, size_bytes: int) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on; it should have ``size_bytes`` in all.

        Raises BundleError where there is no such file, StorageError where it cannot be read now.
        """
        ...


class FolderSource:
    """A bundle in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def manifest(self) -> dict[str, Any]:
        """The folder's manifest."""
        try:
            return consumer.read_manifest(self._folder)
        except consumer.RefusedBundleError as error:
            raise BundleError(f"{self}: {error}") from error

    def refuse_additions(self, manifest: Mapping[str, Any]) -> None:
        """Links, special files, and files that the manifest does not name."""
        try:
            found = consumer.entries(self._folder)
        except OSError as error:
            raise BundleError(f"{self} cannot be read: {error}") from error
        for name, _, mode in found:
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise BundleError(
                    f"{self}: {shown(name)} is a symlink or special file; pull refuses it"
                )
            if stat.S_ISREG(mode) and name not in manifest["files"] and name != consumer.MANIFEST:
                raise BundleError(f"{self}: {shown(name)} is not in the manifest; it was added")

    def read(self, name: str, start: int, size_bytes: int) -> Iterator[bytes]:  # noqa: ARG002
        """Its bytes; a link is not followed."""
        with self._open_without_links(name) as stream:
            stream.seek(start)
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def _open_without_links(self, name: str) -> Any:
        try:
            return consumer.open_plain(self._folder / name)
        except FileNotFoundError:
            raise BundleError(f"{self}: {name} is missing; the manifest names it") from None
        except OSError as error:
            raise BundleError(f"{self}: {name} cannot be read: {error}") from error
