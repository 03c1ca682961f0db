"""Where checkpoints go: a Storage holds named folders of files, each wholly there or not at all.

``Storage`` is the seam for other places than a local disk. All of it is held to the battery in
``tests/contracts/test_storage.py``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from holdfast.training.checkpointing.local_files import NUM_WRITER_THREADS, FileWriter
from holdfast.training.checkpointing.manifest import MANIFEST_NAME, FileEntry, Folder, local_folder
from holdfast.training.checkpointing.policy import Kind
from holdfast.training.checkpointing.slices import WHOLE, Slicing
from holdfast.training.checkpointing.snapshot import FileImage
from holdfast.training.errors import LeaseError, StorageError, StorageFullError
from holdfast.training.runs.durable_json import storage_error, sync_folder
from holdfast.training.runs.faultpoints import reach
from holdfast.training.runs.lease import SET_ASIDE

MARGIN_BYTES = 2**20
"""For manifests, folders and the ends of blocks."""
AT_FDCWD = -100
RENAME_EXCHANGE = 2
NO_EXCHANGE_ERRNOS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

MakeManifest = Callable[[dict[str, FileEntry]], bytes]


class Reader(Protocol):
    """Checkpoints that can be looked at."""

    def names(self) -> list[str]:
        """The folders that were committed, sorted. Raises StorageError."""
        ...

    def folder(self, name: str) -> Folder:
        """One of them. Raises StorageError."""
        ...


class Storage(Reader, Protocol):
    """Checkpoints that can be written, by one writer.

    Every method raises StorageError where bytes cannot be written, and LeaseLostError where this
    writer was replaced by another; what was committed before is untouched then.
    """

    def commit(
        self, name: str, files: Mapping[str, FileImage], make_manifest: MakeManifest
    ) -> None:
        """Make a folder of these files and a manifest, in the place of an earlier one.

        After return it is durable, and all bytes were read back and are right. At every moment
        before, there is either nothing of it or all of it.

        Args:
            name: the folder.
            files: what it will hold besides the manifest.
            make_manifest: called with sizes and digests of ``files`` once they are durable.

        Raises:
            StorageFullError: there is no room; nothing of it is left.
        """
        ...

    def amend(self, name: str, manifest: bytes, keep: frozenset[str]) -> None:
        """Replace a folder's manifest at one stroke, then take away all files but ``keep``."""
        ...

    def remove(self, name: str, keep_as: str | None = None) -> None:
        """Take a folder out at one stroke; its bytes are kept under another name or deleted."""
        ...


class OtherWriters(Protocol):
    """Processes that write files of the same checkpoints, each its own.

    ``slicing`` is what this process keeps itself.
    """

    @property
    def slicing(self) -> Slicing:
        """Of tensors that lie in slices."""
        ...

    def ask(self, kind: Kind | None) -> None:
        """Have them copy what they keep, as of now; None: write again what they have copied."""
        ...

    def begin(self, folder: Path) -> None:
        """The folder that they write to is there."""
        ...

    def entries(self) -> dict[str, FileEntry]:
        """What they have written, durable and read back. Raises what has ended one of them."""
        ...

    def end(self) -> None:
        """After return none of them writes to the folder any more, whatever came of it."""
        ...


class Nobody:
    """There is no other process."""

    slicing: Slicing = WHOLE

    def ask(self, kind: Kind | None) -> None:
        """As ``OtherWriters.ask``."""

    def begin(self, folder: Path) -> None:
        """As ``OtherWriters.begin``."""

    def entries(self) -> dict[str, FileEntry]:
        """As ``OtherWriters.entries``."""
        return {}

    def end(self) -> None:
        """As ``OtherWriters.end``."""


NOBODY: OtherWriters = Nobody()


class LocalReader:
    """Folders on a local disk, or on one that is mounted."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        """As ``Reader.names``."""
        try:
            return sorted(path.name for path in self._root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error("list", self._root, error) from error

    def folder(self, name: str) -> Folder:
        """As ``Reader.folder``."""
        return local_folder(self._root / name)


class LocalStorage(LocalReader):
    """Writes by renaming out of, or into, a staging folder that vanishes with the lease.

    A writer that was replaced gets ENOENT from every rename, see ``runs/lease.py``; therefore
    nothing here makes the staging folder itself. What lies in there is deleted with it, but for a
    damaged folder that is being set aside: that goes through the one folder which is not.
    """

    def __init__(
        self,
        root: Path,
        staging: Path,
        check_lease: Callable[[], None],
        others: OtherWriters = NOBODY,
    ) -> None:
        """Commit into ``root``, on the same file system as ``staging``, which must exist.

        ``others`` write to the staging folder of a checkpoint, too.
        """
        super().__init__(root)
        self._others = others
        self._staging = staging
        self._check_lease = check_lease

    def commit(
        self, name: str, files: Mapping[str, FileImage], make_manifest: MakeManifest
    ) -> None:
        """As ``Storage.commit``."""
        staged = self._staging / name
        needed_bytes = sum(image.size_bytes for image in files.values())
        with self._typed_errors("write", self._root / name, needed_bytes):
            try:
                self._require_space(needed_bytes)
                self._stage(staged, files, make_manifest)
                self._publish(staged, self._root / name)
            finally:
                self._others.end()
                shutil.rmtree(staged, ignore_errors=True)

    def amend(self, name: str, manifest: bytes, keep: frozenset[str]) -> None:
        """As ``Storage.amend``. What is taken away goes through the staging folder, too."""
        folder, staged = self._root / name, self._staging / f"{name}-amended"
        with self._typed_errors("slim", folder):
            try:
                staged.mkdir()
                _write_one(staged / MANIFEST_NAME, manifest)
                self._check_lease()
                reach("slim.before-rename")
                (staged / MANIFEST_NAME).rename(folder / MANIFEST_NAME)
                reach("slim.after-rename")
                sync_folder(folder)
                for file in sorted(local_folder(folder).files - keep - {MANIFEST_NAME}):
                    reach("slim.between-files")
                    (folder / file).rename(staged / file)
                sync_folder(folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        reach("slim.after")

    def remove(self, name: str, keep_as: str | None = None) -> None:
        """As ``Storage.remove``."""
        with self._typed_errors("remove", self._root / name):
            self._check_lease()
            if keep_as is not None:
                waiting = self._staging / SET_ASIDE
                waiting.mkdir(exist_ok=True)
                reach("restore.before-set-aside")
                (self._root / name).rename(waiting / keep_as)
                reach("restore.between-set-aside")
                (waiting / keep_as).rename(self._root / keep_as)
                reach("restore.after-set-aside")
                sync_folder(self._root)
                return
            removed = self._staging / f"{name}-removed"
            reach("prune.before-rename")
            (self._root / name).rename(removed)
            reach("prune.after-rename")
            sync_folder(self._root)
            shutil.rmtree(removed)
            reach("prune.after-delete")

    def _stage(
        self, staged: Path, files: Mapping[str, FileImage], make_manifest: MakeManifest
    ) -> None:
        """Write all files and the manifest; they are durable and verified after return."""
        reach("commit.before-stage")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        reach("commit.after-stage-folder")
        self._others.begin(staged)
        entries = {**write_files(staged, files), **self._others.entries()}
        reach("commit.before-manifest")
        _write_one(staged / MANIFEST_NAME, make_manifest(entries))
        reach("commit.after-manifest")
        sync_folder(staged)

    def _publish(self, staged: Path, target: Path) -> None:
        if not self._root.exists():
            self._root.mkdir(exist_ok=True)
            sync_folder(self._root.parent)
        self._check_lease()
        reach("commit.before-rename")
        try:
            staged.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            exchange(staged, target)
            reach("replace.after-exchange")
        reach("commit.after-rename")
        sync_folder(self._root)
        reach("commit.after-flush")

    def _require_space(self, needed_bytes: int) -> None:
        statistics = os.statvfs(self._staging)
        free_bytes = statistics.f_bavail * statistics.f_frsize
        if free_bytes < needed_bytes + MARGIN_BYTES:
            raise StorageFullError(
                f"a checkpoint needs {needed_bytes + MARGIN_BYTES} bytes, {free_bytes} are free at "
                f"{self._root}: make room, or keep fewer checkpoints (checkpoint.keep_last)",
                needed_bytes=needed_bytes + MARGIN_BYTES,
                free_bytes=free_bytes,
            )

    @contextmanager
    def _typed_errors(self, action: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
        """OSError becomes StorageError, or LeaseLostError if the staging folder was taken away."""
        try:
            yield
        except (StorageError, LeaseError):
            raise
        except OSError as error:
            if error.errno == errno.ENOENT:
                self._check_lease()
            raise storage_error(action, path, error, needed_bytes) from error


def write_files(folder: Path, files: Mapping[str, FileImage]) -> dict[str, FileEntry]:
    """Write files that are not there yet; they are durable and verified after return.

    Raises OSError or StorageError.
    """
    with ThreadPoolExecutor(NUM_WRITER_THREADS, "holdfast-write") as pool:
        writer = FileWriter(pool)
        written = [writer.write(folder / name, image.parts) for name, image in files.items()]
        return {
            file.path.name: FileEntry(size_bytes=file.size_bytes, digest=file.digest())
            for file in written
        }


def _write_one(path: Path, content: bytes) -> None:
    with ThreadPoolExecutor(NUM_WRITER_THREADS) as pool:
        FileWriter(pool).write(path, [content]).digest()


def exchange(staged: Path, target: Path) -> None:
    """Swap two folders, at one stroke where the system can.

    Where it cannot (NFS, systems other than Linux), a crash between the two renames leaves
    neither, and a resume starts from the checkpoint before.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        paths = AT_FDCWD, os.fsencode(staged), AT_FDCWD, os.fsencode(target)
        if rename(*paths, ctypes.c_uint(RENAME_EXCHANGE)) == 0:
            return
        number = ctypes.get_errno()
        if number not in NO_EXCHANGE_ERRNOS:
            raise OSError(number, os.strerror(number), str(staged))
    replaced = staged.with_name(f"{staged.name}-replaced")
    target.rename(replaced)
    staged.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(replaced)
