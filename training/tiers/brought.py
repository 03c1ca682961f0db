"""Slices that other machines bring up themselves, and whoever is first has brought a file up.

    <folder of the holder>/brought/<machine>.json         a tree of what it has brought up
    <folder of the holder>/brought/<machine>/<number>/    the files, by their paths

The holder of the head has all files of a run on its disk, and sends them: its own, then those of
the others, the last one first. Each of these it takes from there as soon as it is told, where it is
listed and has the bytes of its own disk. So uploading is as fast as all machines together; and none
is waited for, or has to be known to live: what does not come, for whatever reason, is sent as if
nobody else did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from holdfast.training.errors import DataFormatError, HoldfastError, StorageError
from holdfast.training.runs.directory import next_segment_number, segments_among
from holdfast.training.runs.faultpoints import reach
from holdfast.training.runs.paths import RunDirectory, parse_step, slice_number
from holdfast.training.runs.stored_json import read_json
from holdfast.training.storage.protocol import ObjectStore
from holdfast.training.tiers.transfer import is_same_file
from holdfast.training.tiers.tree import Tree, TreeFile, newest_steps, parse_tree

FOLDER, SUFFIX = "brought", ".json"
LOOK_EVERY_S = 0.5
ALL = 10**9
"""More ranks than there are."""


def key_of(holder_folder: str, machine: str, number: int, path: str) -> str:
    """Where a machine brings a file to; it must never use a number twice for a path."""
    return f"{holder_folder}/{FOLDER}/{machine}/{number:06d}/{path}"


def tell(store: ObjectStore, holder_folder: str, machine: str, tree: Tree) -> None:
    """Let the holder know what a machine has brought up, and verified. Raises StorageError."""
    store.put(f"{holder_folder}/{FOLDER}/{machine}{SUFFIX}", tree.to_bytes(), "any")


class Brought:
    """What other machines have brought up, as the holder of the head finds it."""

    def __init__(self, store: ObjectStore, run: RunDirectory, holder_folder: str) -> None:
        self._store, self._run = store, run
        self._folder = f"{holder_folder}/{FOLDER}"
        self._told: dict[str, TreeFile] = {}
        self._listed: dict[str, int] = {}
        self._useless: set[str] = set()
        self._others: list[str] = []

    def in_order(self, paths: Iterable[str]) -> list[str]:
        """Files of the run, as they are best sent: last those that others may bring up, too.

        They begin with the first of these, so this machine does with the last.
        """
        if not (paths := [*paths]):
            return []
        num_here = _num_ranks_here(self._run)
        self._others = sorted(path for path in paths if _writer_of(path) > num_here)
        return [*(path for path in paths if path not in self._others), *reversed(self._others)]

    def or_sent(
        self, path: str, link: Path, upload: Callable[[Callable[[], bool]], TreeFile]
    ) -> TreeFile:
        """A file of the run in the bucket, by another machine or by ``upload``.

        Args:
            path: one of those that were put ``in_order``.
            link: the file here.
            upload: sends it, and raises StorageError once what it is given says that it is over.

        Raises what ``upload`` raises, where no other machine has brought the file up.
        """
        if path not in self._others:
            return upload(lambda: False)
        found = self._found(path, link)
        if found is not None:
            return found
        is_over = threading.Event()
        with ThreadPoolExecutor(1, "holdfast-upload") as pool:
            sent = pool.submit(upload, is_over.is_set)
            while found is None and not wait([sent], LOOK_EVERY_S).done:
                found = self._found(path, link)
            is_over.set()
        if found is not None and isinstance(sent.exception(), StorageError):
            return found
        return sent.result()

    def useless(self, tree: Tree) -> set[str]:
        """What was brought up and no tree will name: of a state that is over. Told once."""
        newest = max(newest_steps(tree), default=0)
        unnamed = self._listed.keys() - tree.keys() - self._useless
        found = {key for key in unnamed if _step_of(key) < newest}
        self._useless |= found
        return found

    def left_over(self, tree: Tree) -> set[str]:
        """All that others have left, but for what the tree names; nothing, where it is not seen."""
        if _num_ranks_here(self._run) == ALL:
            return set()
        with suppress(HoldfastError):  # whoever holds the head next deletes it
            self._look()
        return self._listed.keys() - tree.keys()

    def _found(self, path: str, link: Path) -> TreeFile | None:
        """The file as another machine has brought it up; None where none has, as far as is seen."""
        try:
            self._look()
            told = self._told.get(path)
            is_right = (
                told is not None
                and self._listed.get(told.key) == told.size_bytes
                and told.key not in self._useless
                and is_same_file(link, told)
            )
        except (HoldfastError, OSError):
            return None  # whoever sends it says what is wrong
        if is_right:
            reach("brought.taken")
        return told if is_right else None

    def _look(self) -> None:
        self._listed = {entry.key: entry.size_bytes for entry in self._store.list(self._folder)}
        self._told = {}
        for key in self._listed:
            if key.endswith(SUFFIX) and "/" not in key.removeprefix(f"{self._folder}/"):
                found = self._store.get(key)
                if found is not None:
                    self._told |= _told_by(found.content, key)


def _told_by(content: bytes, key: str) -> dict[str, TreeFile]:
    """What one machine says; nothing of one that says what cannot be."""
    try:
        return dict(parse_tree(content, key, key.removesuffix(SUFFIX)).files)
    except DataFormatError:
        return {}


def _step_of(key: str) -> float:
    """Of the checkpoint that an object belongs to; infinite for any other."""
    step = parse_step(key.split("/")[-2])
    return float("inf") if step is None else step


def _writer_of(path: str) -> int:
    """1 for what rank 0 has written as its slices, 0 for what is no slice."""
    return slice_number(path.rpartition("/")[2])


def _num_ranks_here(run: RunDirectory) -> int:
    """How many ranks of the run's newest segment are on the machine of rank 0."""
    newest = run.segment(next_segment_number(run) - 1).name
    for record in segments_among([newest], run, read_json):
        if record.num_machines and record.num_processes:
            return record.num_processes // record.num_machines
    return ALL
