"""What a bucket's runs look like from here: their records, read into a folder like any store.

Whoever only looks needs no lease and changes nothing. A run whose head has not moved since the last
look is not read again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.training.errors import DataFormatError, HoldfastError, StorageError
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import Kinds, Limits, read_json, required_fields
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import Listed, ObjectStore
from holdfast.training.tiers.folder_image import LEASES
from holdfast.training.tiers.head import head_key, listed_heads, name_of, parse_head, run_folder
from holdfast.training.tiers.restoring import LONG_AGO_S
from holdfast.training.tiers.scratch import address_of, replica_folder, run_name, tier_folder
from holdfast.training.tiers.transfer import GoneError, download_file, read_tree
from holdfast.training.tiers.tree import Tree, TreeFile

RUNS_AT_ONCE = 32
MAX_ATTEMPTS = 5
MANIFEST = "manifest.json"
REPORT = "report.html"
LISTED = re.compile(
    r"(segments|losses|lease|\.engine/lease)/.*|(run|evaluation|promotion)\.json|bundle/manifest\.json"
)
RECORDS = re.compile(
    r"(segments|logs|losses|lease|\.engine)/.*|(checkpoints|bundle)/(.*/)?manifest\.json"
    r"|(?!report\.html$)[^/]*"
)
CHECKPOINTS = "checkpoints/"
STEP = re.compile(rf"{CHECKPOINTS}step-[0-9]+/manifest\.json")
"""That a checkpoint is there is seen by its folder."""
ALL = ""
SEEN: Kinds = {
    "tag": (str,),
    "is_listed": (bool, type(None)),
    "also": (list, type(None)),
    "has_report": (bool,),
}
LIMITS = Limits(max_bytes=2**14, max_depth=3)


@dataclass(frozen=True)
class Wanted:
    """Which files of a run are read.

    Attributes:
        is_listed: only what a list of runs shows; otherwise all its records.
        also: what the paths of further files begin with; ``ALL`` for all.
    """

    is_listed: bool = False
    also: tuple[str, ...] = ()

    def takes(self, path: str) -> bool:
        """Whether a file is one of them."""
        records = LISTED if self.is_listed else RECORDS
        return records.fullmatch(path) is not None or path.startswith(self.also)

    def looks_at(self, path: str) -> bool:
        """Whether it matters that there is such a file."""
        return self.takes(path) or path == REPORT or STEP.fullmatch(path) is not None

    def covers(self, other: Wanted) -> bool:
        """Whether all that another wants is among them."""
        is_enough = not self.is_listed or other.is_listed
        return ALL in self.also or (is_enough and all(p.startswith(self.also) for p in other.also))

    def and_also(self, other: Wanted) -> Wanted:
        """What either wants."""
        also = tuple(sorted({*self.also, *other.also}))
        return Wanted(self.is_listed and other.is_listed, also)


def refresh_view(
    address: Address,
    reference: str | None = None,
    *,
    also: tuple[str, ...] = (),
    is_fresh: bool = False,
    is_listed: bool = False,
) -> Path:
    """The store's runs as they are now, below a folder of this machine; returns that folder.

    Args:
        address: the store.
        reference: ``run_id`` or ``experiment/run_id`` of the runs that matter, whose records are
            read; None for all, and of each no more than a list of runs shows.
        also: what the paths of further files begin with that are read; ``ALL`` for all.
        is_fresh: read every byte again, also what was read before.
        is_listed: read no more than a list of runs shows.

    Raises StorageError where the bucket does not answer, InputError where there is none.
    """
    root = tier_folder(address, "view")
    store, wanted = open_store(address), Wanted(is_listed or reference is None, also)
    heads = listed_heads(store)
    asked = [
        listed
        for listed in heads
        if reference is None or reference in (name_of(listed), name_of(listed).split("/")[1])
    ]
    if reference is None:
        _forget_others(root, {name_of(listed) for listed in heads})
    for listed in asked if is_fresh else ():
        shutil.rmtree(root / name_of(listed), ignore_errors=True)
        shutil.rmtree(replica_folder(RunDirectory(root / name_of(listed))), ignore_errors=True)
    with ThreadPoolExecutor(RUNS_AT_ONCE, "holdfast-view") as pool:
        for future in [pool.submit(_refresh, store, root, head, wanted) for head in asked]:
            future.result()
    return root


def viewed(run: RunDirectory, also: tuple[str, ...] = ()) -> RunDirectory:
    """The same run to read from: of a bucket its newest state, of a folder itself.

    ``also`` is as for ``refresh_view``.
    """
    address = address_of(run.path.parent.parent)
    if address is None:
        return run
    name = run_name(run)
    return RunDirectory(refresh_view(address, name, also=also) / name)


def has_report(run: RunDirectory) -> bool:
    """Whether a run has a report, here or in the bucket that it was read from."""
    seen = _seen(run)
    return run.report_html.is_file() or (seen is not None and bool(seen["has_report"]))


def seen_tag(run: RunDirectory) -> str:
    """The tag of the head with which a run was read last; empty for a run that was not."""
    seen = _seen(run)
    return "" if seen is None else str(seen["tag"])


def _refresh(store: ObjectStore, root: Path, listed: Listed, wanted: Wanted) -> None:
    run = RunDirectory(root / name_of(listed))
    seen = _seen(run)
    if seen is not None and seen["tag"] == listed.tag and listed.tag != "":
        known = Wanted(bool(seen.get("is_listed")), tuple(map(str, seen.get("also") or ())))
        if known.covers(wanted):
            return
        wanted = known.and_also(wanted)  # what was read for others stays
    try:
        _read_run(store, run, listed, wanted, is_first=seen is None)
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise storage_error("write", run.path, error) from error


def _read_run(
    store: ObjectStore, run: RunDirectory, listed: Listed, wanted: Wanted, *, is_first: bool
) -> None:
    name = name_of(listed)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        found = store.get(head_key(name))
        if found is None:
            return
        head = parse_head(found.content, name)
        if head.tree is None or head.tree_digest is None:
            return  # it was refused before it began
        try:
            tree = read_tree(store, head.tree, head.tree_digest, run_folder(name), wanted.looks_at)
            _write_files(store, run, as_renewed(tree, head.ttl_s), wanted)
        except GoneError:  # a newer head counts by now
            if attempt == MAX_ATTEMPTS:
                raise
            continue
        # The first sight has only the server's clock; later, what moved was moved just now.
        renewed_s = listed.modified_s if is_first else time.time()
        _date(run, LONG_AGO_S if head.is_released else renewed_s, listed.modified_s)
        _note_seen(run, {"tag": found.tag, **asdict(wanted), "has_report": REPORT in tree.files})
        return


def _note_seen(run: RunDirectory, told: Mapping[str, Any]) -> None:
    folder = replica_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".seen.json.new"
    beside.write_text(json.dumps(told))  # not flushed: it is no more than what was read
    beside.replace(folder / "seen.json")


def as_renewed(tree: Tree, ttl_s: float) -> Tree:
    """The tree with leases that last as long as its head, with which alone they are renewed here.

    On the holder's own disk they are renewed more often, and end sooner.
    """

    def longer(file: TreeFile) -> TreeFile:
        try:
            told = json.loads(file.inline)
            content = json.dumps({**told, "ttl_s": max(ttl_s, told["ttl_s"])}).encode()
        except (ValueError, TypeError, KeyError):
            return file  # not what a holder writes: whoever reads it says so
        return replace(file, inline=content, size_bytes=len(content))

    return Tree(
        {
            path: longer(file) if path.rpartition("/")[0] in LEASES and not file.key else file
            for path, file in tree.files.items()
        }
    )


def _write_files(store: ObjectStore, run: RunDirectory, tree: Tree, wanted: Wanted) -> None:
    """Make the folder hold what is wanted of the tree. Raises OSError or StorageError."""
    files = {path: file for path, file in tree.files.items() if wanted.takes(path)}
    if run.path.is_dir():
        for path in _paths_in(run.path):
            if path not in files:
                (run.path / path).unlink(missing_ok=True)
        _remove_empty(run.path)
    folders = {path.rpartition("/")[0] for path in files}
    folders |= {path.removesuffix(f"/{MANIFEST}") for path in tree.files if STEP.fullmatch(path)}
    for folder in folders:
        os.makedirs(f"{run.path}/{folder}", exist_ok=True)  # noqa: PTH103 - of a thousand runs
    for path, file in files.items():
        if not file.key:
            _write_if_new(f"{run.path}/{path}", file.inline)
            continue
        target = run.path / path
        if not _is_probably(target, file, path):
            beside = target.with_name(f".{target.name}.new")
            try:
                download_file(store, file, beside, is_durable=False)
            except StorageError:
                beside.unlink(missing_ok=True)
                raise
            beside.replace(target)


def _is_probably(target: Path, file: TreeFile, path: str) -> bool:
    """Whether a file is there; those of checkpoints are never changed, others may be."""
    is_fixed = path.startswith((CHECKPOINTS, "candidates/")) and not path.endswith(MANIFEST)
    return is_fixed and target.is_file() and target.stat().st_size == file.size_bytes


def _write_if_new(target: str, content: bytes) -> None:
    """With plain texts for paths, which a thousand runs take long without."""
    try:
        with open(target, "rb") as file:  # noqa: PTH123
            if file.read() == content:
                return
    except FileNotFoundError:
        pass
    folder, _, name = target.rpartition("/")
    beside = f"{folder}/.{name}.new"
    with open(beside, "wb") as file:  # noqa: PTH123
        file.write(content)
    os.replace(beside, target)  # noqa: PTH105


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
            path.unlink(missing_ok=True)  # at one stroke for whoever looks; then what is left
            shutil.rmtree(path.parent, ignore_errors=True)
            shutil.rmtree(replica_folder(RunDirectory(path.parent)), ignore_errors=True)
