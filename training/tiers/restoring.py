"""A run's folder on the scratch disk, made from what the bucket has.

A folder that is the bucket's newest tree, or what this machine made of it since, stays. Another is
replaced by what the tree names: files that are there with the same bytes are taken over, the others
are read. Nobody writes the run here meanwhile, since only the holder of its head restores.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from holdfast.training.errors import DataFormatError, StorageError
from holdfast.training.runs.durable_json import storage_error, sync_folder, write_json_durably
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import Kinds, Limits, read_json, required_fields
from holdfast.training.storage.protocol import PART_BYTES, ObjectStore
from holdfast.training.tiers.folder_image import LEASES, look_at
from holdfast.training.tiers.late_files import absent_here, bring
from holdfast.training.tiers.scratch import replica_folder
from holdfast.training.tiers.transfer import download_file, is_same_file
from holdfast.training.tiers.tree import Tree, TreeFile, has_checkpoints

logger = logging.getLogger(__name__)

FILES_AT_ONCE, LARGE_AT_ONCE = 8, 2
"""A large one reads several ranges at once by itself; one is read while another is flushed."""
LIMITS = Limits(max_bytes=2**14, max_depth=2)
LONG_AGO_S = 1.0
BASE: Kinds = {"tree_digest": (str, type(None)), "begun_digest": (str, type(None))}
Told = Callable[[str], None]


def known_base(run: RunDirectory) -> str | None:
    """The digest of the tree that the folder was made from or last brought up as; None unknown."""
    path = replica_folder(run) / "base.json"
    try:
        told = required_fields(read_json(path, LIMITS), path, BASE)
    except (FileNotFoundError, DataFormatError):
        return None
    return told.get("tree_digest") or told.get("begun_digest")


def note_base(run: RunDirectory, tree_digest: str, *, is_whole: bool = True) -> None:
    """Keep what the folder is a copy of. Raises StorageError.

    One that is not whole has files to come, of which an earlier version of Holdfast knows nothing:
    under a name that it does not read, it makes the folder anew.
    """
    folder = replica_folder(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("make the folder", folder, error) from error
    name = "tree_digest" if is_whole else "begun_digest"
    write_json_durably(folder / "base.json", {name: tree_digest})


def restore_folder(
    store: ObjectStore,
    tree: Tree,
    tree_digest: str,
    run: RunDirectory,
    tell: Told = lambda _: None,
    later: Collection[str] = frozenset(),
) -> None:
    """Make the run's folder what the tree says; leases in it are presumed dead.

    The files that come ``later`` need not be there after return. Interrupted, it goes on where it
    stood. Raises StorageError.
    """
    needed = Tree({path: file for path, file in tree.files.items() if path not in later})
    size_bytes = sum(file.size_bytes for file in needed.files.values())
    try:
        if _is_copy(run, tree, tree_digest):
            _end_leases(run.path)
            for path, file in absent_here(run, needed).items():
                bring(store, run, path, file)
            return
        tell(f"reading {len(needed.files)} files, {size_bytes / 2**20:.1f} MiB, from the store")
        making = run.path.with_name(f".{run.path.name}.restoring")
        _remove_strangers(making, tree)
        _fill(store, needed, run.path, making)
        _end_leases(making)
        _put_in_place(making, run.path)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error("restore", run.path, error, size_bytes) from error
    note_base(run, tree_digest, is_whole=not later)


def _is_copy(run: RunDirectory, tree: Tree, tree_digest: str) -> bool:
    """Whether the folder is what the tree says, or what this machine made of it since."""
    is_wiped = has_checkpoints(tree.files) and not has_checkpoints(look_at(run.path))
    return not is_wiped and run.run_json.is_file() and known_base(run) == tree_digest


def _fill(store: ObjectStore, tree: Tree, old: Path, making: Path) -> None:
    """All files of the tree below ``making``, each right."""
    making.mkdir(parents=True, exist_ok=True)

    def make(item: tuple[str, TreeFile]) -> None:
        path, file = item
        target = making / path
        if _is_right(target, file):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if _is_right(old / path, file):
            target.unlink(missing_ok=True)
            os.link(old / path, target, follow_symlinks=False)
            return
        download_file(store, file, target)

    small = [item for item in tree.files.items() if item[1].size_bytes <= PART_BYTES]
    large = [item for item in tree.files.items() if item[1].size_bytes > PART_BYTES]
    for items, num_at_once in ((small, FILES_AT_ONCE), (large, LARGE_AT_ONCE)):
        with ThreadPoolExecutor(num_at_once, "holdfast-restore") as pool:
            for future in [pool.submit(make, item) for item in items]:
                future.result()


def _is_right(path: Path, file: TreeFile) -> bool:
    try:
        return is_same_file(path, file)
    except OSError:
        return False


def _remove_strangers(making: Path, tree: Tree) -> None:
    """Of what an interrupted restoring left, keep what this tree names."""
    if making.is_symlink() or (making.exists() and not making.is_dir()):
        making.unlink()
    for path in sorted(making.rglob("*"), reverse=True) if making.exists() else ():
        name = path.relative_to(making).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(file.startswith(f"{name}/") for file in tree.files):
                path.rmdir()
        elif name not in tree.files:
            path.unlink()


def _end_leases(folder: Path) -> None:
    """The head says who writes; who wrote this folder before does not, any more."""
    for lease in LEASES:
        for path in (folder / lease).glob("*.json") if (folder / lease).is_dir() else ():
            os.utime(path, (LONG_AGO_S, LONG_AGO_S))


def _put_in_place(making: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    for folder in (making, *(path for path in making.rglob("*") if path.is_dir())):
        sync_folder(folder)
    if target.exists():
        target.rename(replaced)
    making.rename(target)
    sync_folder(target.parent)
    for left in target.parent.glob(f".{target.name}.replaced-*"):
        shutil.rmtree(left, ignore_errors=True)
