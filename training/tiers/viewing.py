"""What a bucket's runs look like from here: their records, read into a folder like any store.

Whoever only looks needs no lease and changes nothing. A run whose head has not moved since the last
look is not read again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from holdfast.training.errors import DataFormatError, HoldfastError, StorageError
from holdfast.training.runs.durable_json import storage_error, write_json_durably
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import Kinds, Limits, read_json, required_fields
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import Listed, ObjectStore
from holdfast.training.tiers.folder_image import LEASES
from holdfast.training.tiers.head import HEADS, head_key, name_of, parse_head, run_folder
from holdfast.training.tiers.restoring import replica_folder
from holdfast.training.tiers.scratch import address_of, run_name, tier_folder
from holdfast.training.tiers.transfer import download_file, read_tree
from holdfast.training.tiers.tree import NAME, Tree, TreeFile

RUNS_AT_ONCE = 32
MAX_ATTEMPTS = 5
RECORD_FOLDERS = ("segments", "logs", "losses", "lease", ".engine")
MANIFEST = "manifest.json"
REPORT = "report.html"
SEEN: Kinds = {"tag": (str,), "is_whole": (bool,), "has_report": (bool,)}
LIMITS = Limits(max_bytes=2**14, max_depth=2)
LONG_AGO_S = 1.0


def refresh_view(
    address: Address,
    reference: str | None = None,
    *,
    is_whole: bool = False,
    is_fresh: bool = False,
) -> Path:
    """The store's runs as they are now, below a folder of this machine; returns that folder.

    Args:
        address: the store.
        reference: ``run_id`` or ``experiment/run_id`` of the runs that matter; None for all.
        is_whole: all files of the run, and not its records alone.
        is_fresh: read every byte again, also what was read before.

    Raises StorageError where the bucket does not answer, InputError where there is none.
    """
    root = tier_folder(address, "view")
    store = open_store(address)
    heads = [listed for listed in store.list(HEADS) if _is_run(name_of(listed))]
    names = {name_of(listed) for listed in heads}
    wanted = [
        listed
        for listed in heads
        if reference is None or reference in (name_of(listed), name_of(listed).split("/")[1])
    ]
    if reference is None:
        _forget_others(root, names)
    for listed in wanted if is_fresh else ():
        shutil.rmtree(root / name_of(listed), ignore_errors=True)
        shutil.rmtree(replica_folder(RunDirectory(root / name_of(listed))), ignore_errors=True)
    with ThreadPoolExecutor(RUNS_AT_ONCE, "holdfast-view") as pool:
        for future in [pool.submit(_refresh, store, root, head, is_whole) for head in wanted]:
            future.result()
    return root


def viewed(run: RunDirectory, *, is_whole: bool = False) -> RunDirectory:
    """The same run to read from: of a bucket its newest state, of a folder itself."""
    address = address_of(run.path.parent.parent)
    if address is None:
        return run
    name = run_name(run)
    return RunDirectory(refresh_view(address, name, is_whole=is_whole) / name)


def has_report(run: RunDirectory) -> bool:
    """Whether a run has a report, here or in the bucket that it was read from."""
    seen = _seen(run)
    return run.report_html.is_file() or (seen is not None and bool(seen["has_report"]))


def _is_run(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(NAME.fullmatch(part) and part[0] != "." for part in parts)


def _refresh(store: ObjectStore, root: Path, listed: Listed, is_whole: bool) -> None:
    run = RunDirectory(root / name_of(listed))
    seen = _seen(run)
    is_known = seen is not None and seen["tag"] == listed.tag and listed.tag != ""
    if is_known and seen is not None and (seen["is_whole"] or not is_whole):
        return
    try:
        _read_run(store, run, listed, is_first=seen is None, is_whole=is_whole)
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise storage_error("write", run.path, error) from error


def _read_run(
    store: ObjectStore, run: RunDirectory, listed: Listed, *, is_first: bool, is_whole: bool
) -> None:
    name = name_of(listed)
    for _ in range(MAX_ATTEMPTS):  # the tree that a head named may be gone by the time it is read
        found = store.get(head_key(name))
        if found is None:
            return
        head = parse_head(found.content, name)
        if head.tree is None or head.tree_digest is None:
            return  # it was refused before it began
        tree = read_tree(store, head.tree, head.tree_digest, run_folder(name))
        if tree is not None and _write_files(store, run, tree, is_whole=is_whole):
            break
    else:
        raise StorageError(f"{name} changes faster than it can be read; try again")
    # The first sight has only the server's clock; later, what moved was moved just now.
    renewed_s = listed.modified_s if is_first else time.time()
    _date(run, LONG_AGO_S if head.is_released else renewed_s, listed.modified_s)
    folder = replica_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "tag": found.tag,
        "is_whole": is_whole,
        "has_report": REPORT in tree.files,
    }
    write_json_durably(folder / "seen.json", told)


def _write_files(store: ObjectStore, run: RunDirectory, tree: Tree, *, is_whole: bool) -> bool:
    """Make the folder hold what is wanted of the tree; False where an object is gone."""
    wanted = {path: file for path, file in tree.files.items() if is_whole or _is_record(path)}
    for path in _paths_in(run.path):
        if path not in wanted:
            (run.path / path).unlink(missing_ok=True)
    _remove_empty(run.path)
    for path, file in wanted.items():
        target = run.path / path
        if not file.key:
            _write_if_new(target, file)
        elif not _is_probably(target, file, path):
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.new")
            try:
                download_file(store, file, beside)
            except StorageError:
                beside.unlink(missing_ok=True)
                if store.get(file.key) is None:
                    return False
                raise
            beside.replace(target)
    return True


def _is_record(path: str) -> bool:
    first, _, rest = path.partition("/")
    if first in ("checkpoints", "bundle"):
        return path.endswith(f"/{MANIFEST}")
    return first in RECORD_FOLDERS or (not rest and first != REPORT)


def _is_probably(target: Path, file: TreeFile, path: str) -> bool:
    """Whether a file is there; those of checkpoints are never changed, others may be."""
    is_fixed = path.startswith(("checkpoints/", "candidates/")) and not path.endswith(MANIFEST)
    return is_fixed and target.is_file() and target.stat().st_size == file.size_bytes


def _write_if_new(target: Path, file: TreeFile) -> None:
    try:
        if target.read_bytes() == file.inline:
            return
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.new")
    beside.write_bytes(file.inline)
    beside.replace(target)


def _paths_in(folder: Path) -> Iterable[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def _remove_empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else ():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _date(run: RunDirectory, renewed_s: float, changed_s: float) -> None:
    """Give leases the time at which their holder was last heard of, and the run its last change."""
    for lease in LEASES:
        folder = run.path / lease
        for path in folder.glob("*.json") if folder.is_dir() else ():
            os.utime(path, (renewed_s, renewed_s))
    if run.run_json.is_file():
        os.utime(run.run_json, (changed_s, changed_s))


def _seen(run: RunDirectory) -> dict[str, Any] | None:
    path = replica_folder(run) / "seen.json"
    try:
        return required_fields(read_json(path, LIMITS), path, SEEN)
    except (FileNotFoundError, DataFormatError):
        return None


def _forget_others(root: Path, names: set[str]) -> None:
    """Runs that are no longer in the bucket are no longer shown."""
    for path in root.glob("*/*/run.json"):
        name = path.parent.relative_to(root).as_posix()
        if name not in names:
            path.unlink(missing_ok=True)
