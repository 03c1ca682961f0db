"""A Storage in memory: no disk, the same contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.manifest import MANIFEST_NAME, FileEntry, Folder
from holdfast.training.checkpointing.snapshot import FileImage
from holdfast.training.checkpointing.storage import MakeManifest
from holdfast.training.errors import CheckpointCorruptError, StorageError, StorageFullError


@dataclass
class MemoryStorage:
    """Folders as dicts; each is replaced as a whole."""

    check_lease: Callable[[], None] = lambda: None
    capacity_bytes: int = 2**30
    folders: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return sorted(self.folders)

    def folder(self, name: str) -> Folder:
        files = self.folders.get(name, {})

        def read(file: str, algorithm: str, size_bytes: int | None) -> tuple[Tensor, str]:
            if file not in files:
                raise CheckpointCorruptError(f"{name}/{file} is missing")
            content = files[file]
            if size_bytes not in (None, len(content)):
                raise CheckpointCorruptError(
                    f"{name}/{file} has {len(content)} bytes, the manifest says {size_bytes}"
                )
            memory = torch.empty(len(content), dtype=torch.uint8)
            memory.numpy().data[:] = content
            return memory, digest_of([content], algorithm)

        return Folder(Path(name), frozenset(files), read)

    def commit(
        self, name: str, files: Mapping[str, FileImage], make_manifest: MakeManifest
    ) -> None:
        needed_bytes = sum(image.size_bytes for image in files.values())
        used_bytes = sum(len(data) for old in self.folders.values() for data in old.values())
        free_bytes = self.capacity_bytes - used_bytes
        if needed_bytes > free_bytes:
            raise StorageFullError(
                f"{needed_bytes} bytes are needed, {free_bytes} are free",
                needed_bytes=needed_bytes,
                free_bytes=free_bytes,
            )
        content = {file: b"".join(image.parts) for file, image in files.items()}
        entries = {
            file: FileEntry(size_bytes=len(data), digest=digest_of([data]))
            for file, data in content.items()
        }
        content[MANIFEST_NAME] = make_manifest(entries)
        self.check_lease()
        self.folders[name] = content

    def amend(self, name: str, manifest: bytes, keep: frozenset[str]) -> None:
        self.check_lease()
        kept = {file: data for file, data in self._existing(name).items() if file in keep}
        self.folders[name] = {**kept, MANIFEST_NAME: manifest}

    def remove(self, name: str, keep_as: str | None = None) -> None:
        self.check_lease()
        content = self._existing(name)
        del self.folders[name]
        if keep_as is not None:
            self.folders[keep_as] = content

    def _existing(self, name: str) -> dict[str, bytes]:
        if name not in self.folders:
            raise StorageError(f"there is no {name}")
        return self.folders[name]
