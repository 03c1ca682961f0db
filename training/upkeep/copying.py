"""Copy a run from one store to another: folders and buckets, either way.

Whoever copies is the run's one writer in both stores meanwhile, so what is copied is one state. The
run is in the other store as a whole, or not at all; interrupted, the same command goes on with what
is there. Leases stay behind: in the other store nobody writes it yet.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from holdfast.training.checkpointing.digests import digest_of, file_parts
from holdfast.training.errors import DataFormatError, HoldfastError, RunConflictError, StorageError
from holdfast.training.runs.durable_json import storage_error, sync_folder, write_json_durably
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import read_json
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.probe import require_fit
from holdfast.training.storage.protocol import PART_BYTES, ObjectStore
from holdfast.training.tiers.bandwidth import asked_limit
from holdfast.training.tiers.folder_image import look_at
from holdfast.training.tiers.head import HeadLease, run_folder
from holdfast.training.tiers.keeping import opened_replica
from holdfast.training.tiers.scratch import address_of, replica_folder, run_name
from holdfast.training.tiers.transfer import is_same_file, read_tree, upload_file
from holdfast.training.tiers.tree import LIMITS, Tree, TreeFile, parse_tree
from holdfast.training.upkeep.census import ENGINE
from holdfast.training.upkeep.shelves import LEASE_TTL_S

FILES_AT_ONCE = 8
STAYS = ("lease", ENGINE)
"""Of a run: who writes it in its own store."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Copied:
    """What a copy took.

    Attributes:
        num_files, num_bytes: that the run has.
        num_new: files that were not there yet.
    """

    num_files: int
    num_bytes: int
    num_new: int


def copy_run(run: RunDirectory, target: Path, tell: Tell = lambda _: None) -> Copied:
    """Copy a run to another store, under the same name.

    Args:
        run: of a store; of a bucket, in the folder where it would be written.
        target: the other store, as ``store_path`` has it.
        tell: told in one line what takes long.

    Raises:
        LeaseHeldError: the run is being written, in one of the two.
        RunConflictError: another run, or another state of this one, has its name in the target.
        InputError: the target is not fit.
        StorageError: one of the two cannot be read or written.
    """
    there = RunDirectory(target / run.path.parent.name / run.path.name)
    if there.path == run.path:
        raise RunConflictError(f"{run_name(run)} lies in that store already: name another one")
    with _held(run, tell):
        paths = [path for path in look_at(run.path) if path.partition("/")[0] not in STAYS]
        files = _digested(run.path, sorted(paths))
        if address_of(target) is None:
            num_new = _to_folder(run, there, files)
        else:
            num_new = _to_bucket(run, there, files)
    return Copied(len(files), sum(file.size_bytes for file in files.values()), num_new)


@contextmanager
def _held(run: RunDirectory, tell: Tell) -> Iterator[None]:
    """Be the run's one writer; what a bucket has of it is in its folder then."""
    if address_of(run.path.parent.parent) is not None:
        with opened_replica(run, tell=tell):
            yield
        return
    engine = RunDirectory(run.path / ENGINE)
    with Lease.acquire(engine, LEASE_TTL_S), Lease.acquire(run, LEASE_TTL_S):
        yield


def _digested(folder: Path, paths: list[str]) -> dict[str, TreeFile]:
    def digested(path: str) -> TreeFile:
        return TreeFile((folder / path).stat().st_size, digest_of(file_parts(folder / path)))

    try:
        with ThreadPoolExecutor(FILES_AT_ONCE, "holdfast-digest") as pool:
            return dict(zip(paths, pool.map(digested, paths), strict=True))
    except OSError as error:
        raise storage_error("read", folder, error) from error


def _to_folder(run: RunDirectory, there: RunDirectory, files: Mapping[str, TreeFile]) -> int:
    making = there.path.with_name(f".{there.path.name}.copying")
    lock = RunDirectory(there.path.with_name(f".{there.path.name}.copying-lease"))
    size_bytes = sum(file.size_bytes for file in files.values())
    try:
        with Lease.acquire(lock, LEASE_TTL_S):
            num_new = _made(run.path, making, there, files)
        shutil.rmtree(lock.path, ignore_errors=True)
        return num_new
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise storage_error("copy to", there.path, error, size_bytes) from error


def _made(source: Path, making: Path, there: RunDirectory, files: Mapping[str, TreeFile]) -> int:
    if os.path.lexists(there.path):
        _require_same(there, files)
        return 0
    num_new = _fill(source, making, files)
    for folder in (making, *(path for path in making.rglob("*") if path.is_dir())):
        sync_folder(folder)
    making.rename(there.path)  # onto a folder with content it fails
    sync_folder(there.path.parent)
    return num_new


def _require_same(there: RunDirectory, files: Mapping[str, TreeFile]) -> None:
    for path, file in files.items():
        if not is_same_file(there.path / path, file):
            raise _conflict(str(there.path), path)


def _conflict(place: str, path: str) -> RunConflictError:
    return RunConflictError(
        f"{place} is another run, or another state of this one: {path} differs there. Nothing was "
        f"changed; take another store, or delete that run"
    )


def _fill(source: Path, making: Path, files: Mapping[str, TreeFile]) -> int:
    """All files below ``making``, each flushed and read back; how many were not there yet."""
    for left in sorted(making.rglob("*"), reverse=True) if making.is_dir() else ():
        if not left.is_dir() and left.relative_to(making).as_posix() not in files:
            left.unlink()
    num_new = 0
    for path, file in files.items():
        target = making / path
        if is_same_file(target, file):
            continue
        num_new += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as written:
            for part in file_parts(source / path):
                written.write(part)
            written.flush()
            os.fsync(written.fileno())
        if not is_same_file(target, file):
            raise StorageError(f"{target} was written and reads back otherwise; try again")
    return num_new


def _to_bucket(run: RunDirectory, there: RunDirectory, files: Mapping[str, TreeFile]) -> int:
    address, name = address_of(there.path.parent.parent), run_name(run)
    assert address is not None
    store = open_store(address)
    require_fit(store, str(address))
    head = HeadLease.acquire(store, name)
    try:
        if head.head.tree is not None and head.head.tree_digest is not None:
            known = read_tree(store, head.head.tree, head.head.tree_digest, run_folder(name))
            _require_same_tree(known, files, f"{address}/{name}")
            return 0
        return _brought_up(store, run, there, head, files)
    finally:
        if head.head.tree is None:
            head.remove()
        else:
            head.release()


def _require_same_tree(known: Tree, files: Mapping[str, TreeFile], place: str) -> None:
    for path, file in files.items():
        if path not in known.files or known.files[path].digest != file.digest:
            raise _conflict(place, path)


def _brought_up(
    store: ObjectStore,
    run: RunDirectory,
    there: RunDirectory,
    head: HeadLease,
    files: Mapping[str, TreeFile],
) -> int:
    """Bring up what is not there yet, then let it count as a whole; how many files that were."""
    name, journal = run_name(run), replica_folder(there) / "copy.json"
    sizes = {entry.key: entry.size_bytes for entry in store.list(run_folder(name))}
    done = {
        path: file
        for path, file in _journaled(journal, name).items()
        if path in files
        and file.digest == files[path].digest
        and (not file.key or sizes.get(file.key) == file.size_bytes)
    }
    folder = f"{run_folder(name)}/{head.head.folder}/000001"
    throttle, new = asked_limit(), [path for path in files if path not in done]

    def upload(path: str) -> TreeFile:
        head.check()
        return upload_file(store, run.path / path, f"{folder}/{path}", throttle.take)

    small = [path for path in new if files[path].size_bytes <= PART_BYTES]
    with ThreadPoolExecutor(FILES_AT_ONCE, "holdfast-copy") as pool:
        done |= zip(small, pool.map(upload, small), strict=True)
    _keep_journal(journal, done)
    for path in new:
        if path not in done:
            done[path] = upload(path)
            _keep_journal(journal, done)
    content = Tree({path: done[path] for path in files}).to_bytes()
    store.put(f"{folder}/tree.json", content, "any")
    head.commit(f"{folder}/tree.json", digest_of([content]))
    named = {f"{folder}/tree.json", *(file.key for file in done.values())}
    store.delete([key for key in sizes if key not in named])
    journal.unlink(missing_ok=True)
    return len(new)


def _journaled(journal: Path, name: str) -> Mapping[str, TreeFile]:
    """What an interrupted copy from this machine has brought up."""
    try:
        read_json(journal, LIMITS)
        return parse_tree(journal.read_bytes(), str(journal), run_folder(name)).files
    except (FileNotFoundError, DataFormatError):
        return {}


def _keep_journal(journal: Path, done: Mapping[str, TreeFile]) -> None:
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("make the folder", journal.parent, error) from error
    write_json_durably(journal, json.loads(Tree(done).to_bytes()))
