"""What a run trains without: the files of its older checkpoints come while it goes on.

A machine that takes a run over reads the newest checkpoint first, and of the others the manifests,
which say what retention needs to know. That a file is still to come is written nowhere, since it is
seen: a checkpoint is committed with all files that its manifest names, and its manifest changes
before one of them goes. So one that a manifest names, and that is not there, has not come yet. The
bucket keeps it as long as that is so; where the checkpoint goes, or its manifest names the file no
more, it goes.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from holdfast.training.errors import DataFormatError, HoldfastError, LeaseLostError, StorageError
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.faultpoints import reach
from holdfast.training.runs.paths import RunDirectory, parse_step
from holdfast.training.runs.stored_json import parse_json, required_fields
from holdfast.training.storage.protocol import ObjectStore
from holdfast.training.tiers.folder_image import look_at
from holdfast.training.tiers.scratch import replica_folder
from holdfast.training.tiers.transfer import download_file
from holdfast.training.tiers.tree import Tree, TreeFile

CHECKPOINTS, MANIFEST, STATE = "checkpoints", "manifest.json", "state.json"
COMING = "coming-"
"""What files on their way are called, beside the run."""
LOOK_EVERY_S = 0.2
RETRY_S = 2.0
PATIENCE_S = 300.0


def put_off(tree: Tree) -> frozenset[str]:
    """The files that are read later: those of all checkpoints but the newest state, no manifest."""
    files = [path.split("/") for path in tree.files if path.startswith(f"{CHECKPOINTS}/")]
    states = [parse_step(parts[1]) for parts in files if parts[2:] == [STATE]]
    newest = max((step for step in states if step is not None), default=None)
    return frozenset(
        "/".join(parts)
        for parts in files
        if parts[-1] != MANIFEST and (newest is None or parse_step(parts[1]) != newest)
    )


def absent_files(
    tree: Tree, paths: Collection[str], read: Callable[[str], bytes]
) -> dict[str, TreeFile]:
    """The files that are still to come, by path.

    Args:
        tree: what the bucket has.
        paths: of the files that are here.
        read: gives the bytes of one of them.
    """
    absent: dict[str, TreeFile] = {}
    named: dict[str, Mapping[str, int]] = {}
    for path, file in tree.files.items():
        folder, _, name = path.rpartition("/")
        manifest = f"{folder}/{MANIFEST}"
        if not path.startswith(f"{CHECKPOINTS}/") or path in paths or manifest not in paths:
            continue
        if folder not in named:
            named[folder] = _named_sizes(read(manifest), manifest)
        if named[folder].get(name) == file.size_bytes:
            absent[path] = file
    return absent


def absent_here(run: RunDirectory, tree: Tree) -> dict[str, TreeFile]:
    """As ``absent_files``, of the run's folder. Raises OSError or StorageError."""
    return absent_files(tree, look_at(run.path), lambda path: (run.path / path).read_bytes())


def _named_sizes(content: bytes, source: str) -> dict[str, int]:
    """The files that a manifest names; none for one that cannot be read."""
    try:
        files = required_fields(parse_json(content, source), source, {"files": (dict,)})["files"]
        return {
            name: required_fields(entry, source, {"size_bytes": (int,)})["size_bytes"]
            for name, entry in files.items()
        }
    except DataFormatError:
        return {}


def bring(
    store: ObjectStore,
    run: RunDirectory,
    path: str,
    file: TreeFile,
    before_part: Callable[[int], None] = lambda _: None,
) -> None:
    """Put one file where it belongs, unless its checkpoint has gone meanwhile.

    Raises StorageError or OSError, and what ``before_part`` raises.
    """
    folder, target = replica_folder(run), run.path / path
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{COMING}{secrets.token_hex(4)}"
    reach("store.before-late-file")
    try:
        download_file(store, file, place, before_part=before_part)
        reach("store.after-late-file")
        os.link(place, target)
        if target.name not in _named_sizes((target.parent / MANIFEST).read_bytes(), path):
            target.unlink()  # slimmed in between
    except (FileNotFoundError, FileExistsError):
        return  # the checkpoint has gone, or was saved again
    finally:
        place.unlink(missing_ok=True)


class LateFiles:
    """Brings what is still to come, the newest checkpoint first, in a thread of its own."""

    def __init__(
        self,
        store: ObjectStore,
        run: RunDirectory,
        tree: Callable[[], Tree],
        check: Callable[[], None],
    ) -> None:
        """``tree`` is what the bucket has by then, ``check`` raises once another has the run."""
        self._store, self._run, self._tree, self._check = store, run, tree, check
        self._should_stop = threading.Event()
        self._thread = threading.Thread(target=self._bring_all, name="holdfast-late", daemon=True)

    def start(self) -> None:
        """Begin, where there is something to come. Raises StorageError."""
        folder = replica_folder(self._run)
        try:
            for left in folder.glob(f"{COMING}*"):
                left.unlink(missing_ok=True)
            if absent_here(self._run, self._tree()):
                _mark(self._run).touch()
                self._thread.start()
            else:
                _mark(self._run).unlink(missing_ok=True)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise storage_error("write", folder, error) from error

    def stop(self) -> None:
        """Leave the rest where it is. A part that is on its way is not waited for."""
        self._should_stop.set()

    def _bring_all(self) -> None:
        brought: set[str] = set()
        while not self._should_stop.is_set():
            try:
                self._check()
                absent = absent_here(self._run, self._tree())
                left = sorted(absent.keys() - brought)
                if not left:
                    _mark(self._run).unlink(missing_ok=True)
                    return
                bring(self._store, self._run, left[-1], absent[left[-1]], self._before_part)
                brought.add(left[-1])
            except LeaseLostError:
                return
            except (HoldfastError, OSError):  # whoever needs the file says so
                self._should_stop.wait(RETRY_S)

    def _before_part(self, _: int) -> None:
        if self._should_stop.is_set():
            raise StorageError("given up: nobody trains here any more")


def await_files(
    run: RunDirectory, should_stop: Callable[[], bool], checkpoint: str, names: Collection[str]
) -> bool:
    """Wait until these files of a checkpoint are here, while files come from a bucket.

    False where ``should_stop`` ended that. Raises StorageError where none comes for five minutes.
    """
    folder = run.checkpoints / checkpoint
    seen, changed_s = None, time.monotonic()
    while _mark(run).exists():
        absent = [name for name in sorted(names) if not (folder / name).exists()]
        if not absent:
            break
        if should_stop():
            return False
        now = len(absent), _coming(run)
        if now != seen:
            seen, changed_s = now, time.monotonic()
        if time.monotonic() - changed_s > PATIENCE_S:
            raise StorageError(
                f"{folder / absent[0]} has not come from the store for {PATIENCE_S:g} s: resume "
                f"the run when the store answers"
            )
        time.sleep(LOOK_EVERY_S)
    return True


def await_all(run: RunDirectory, should_stop: Callable[[], bool]) -> bool:
    """The same for all checkpoints of the run; whether they are all here."""
    for path in sorted(run.checkpoints.glob(f"*/{MANIFEST}")):
        with suppress(FileNotFoundError):  # it went while others were waited for
            names = _named_sizes(path.read_bytes(), str(path))
            if not await_files(run, should_stop, path.parent.name, names):
                return False
    return True


def _mark(run: RunDirectory) -> Path:
    """A file that is there while others are still to come."""
    return replica_folder(run) / "begun"


def _coming(run: RunDirectory) -> list[tuple[str, int]]:
    """What is on its way, and how much of it is here."""
    found = []
    for path in replica_folder(run).glob(f"{COMING}*"):
        with suppress(FileNotFoundError):
            found.append((path.name, path.stat().st_size))
    return found
