"""The runs of a bucket as a list shows them: of each what a summary is made of, in one small file.

A folder for each run, as ``viewing.py`` makes it for who looks at one, takes a dozen files and as
many folders: for a thousand runs that lasts longer than reading the bucket. A run whose head has
not moved since the last look is not read again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.training.errors import DataFormatError, StorageError
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.stored_json import Kinds, Limits, read_json, required_fields
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import Listed, ObjectStore
from holdfast.training.tiers.head import head_key, listed_heads, name_of, parse_head, run_folder
from holdfast.training.tiers.restoring import LONG_AGO_S
from holdfast.training.tiers.scratch import store_folder
from holdfast.training.tiers.transfer import AlteredError, GoneError, read_small_file, read_tree
from holdfast.training.tiers.tree import Tree
from holdfast.training.tiers.viewing import as_renewed

RUNS_AT_ONCE = 16
MAX_ATTEMPTS = 5
FOLDER = "list"
READ = re.compile(r"segments/[^/]*|lease/[^/]*|(evaluation|promotion)\.json")
COUNTED = re.compile(
    r"losses/[^/]*|checkpoints/[^/]*/manifest\.json|bundle/manifest\.json|run\.json|report\.html"
)
LIMITS = Limits(max_bytes=2**28, max_depth=3)
FIELDS: Kinds = {
    "tag": (str,),
    "renewed_s": (float,),
    "modified_s": (float,),
    "sizes": (dict,),
    "texts": (dict,),
}


@dataclass(frozen=True)
class ListedRun:
    """A run of a bucket, as its head and its tree had it at one moment.

    Attributes:
        name: ``experiment/run_id``.
        tag: of the head.
        renewed_s: when its holder was last heard of; long ago where it has let go.
        modified_s: when its head was moved, on the server's clock.
        sizes: of all files that a summary looks at, by path.
        texts: what those hold that it reads.
        problem: why nothing of it can be read; empty where it can.
    """

    name: str
    modified_s: float
    tag: str = ""
    renewed_s: float = LONG_AGO_S
    sizes: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    def sizes_in(self, folder: str) -> list[tuple[str, int]]:
        """What there is in a folder of the run: names, and bytes of files."""
        found = ((path.split("/"), size) for path, size in self.sizes.items())
        return [(parts[1], size) for parts, size in found if parts[0] == folder]

    def names_in(self, folder: str) -> list[str]:
        """Their names alone."""
        return [name for name, _ in self.sizes_in(folder)]


def listed_runs(address: Address) -> list[ListedRun]:
    """All runs of a bucket as they are now, the one that was changed last first.

    Raises StorageError where the bucket does not answer, InputError where there is none.
    """
    store, folder = open_store(address), store_folder(address) / FOLDER
    heads = listed_heads(store)

    def look(listed: Listed) -> ListedRun | None:
        try:
            return _look(store, listed, folder)
        except (AlteredError, DataFormatError, GoneError) as error:
            return ListedRun(name_of(listed), listed.modified_s, problem=str(error))

    try:
        for experiment in {name_of(listed).split("/")[0] for listed in heads}:
            (folder / experiment).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(RUNS_AT_ONCE, "holdfast-list") as pool:
            found = [run for run in pool.map(look, heads) if run is not None]
        _forget_others(folder, {run.name for run in found})
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error("write", folder, error) from error
    return sorted(found, key=lambda run: (run.modified_s, run.name), reverse=True)


def _look(store: ObjectStore, listed: Listed, folder: Path) -> ListedRun | None:
    """A run as it is now; None for one that was refused before it began."""
    name = name_of(listed)
    path = folder / f"{name}.json"
    known = _known(path, name)
    if known is not None and known.tag == listed.tag:
        return known
    for attempt in range(1, MAX_ATTEMPTS + 1):
        found = store.get(head_key(name))
        if found is None:
            return None
        if known is not None and known.tag == found.tag:
            return known
        head = parse_head(found.content, name)
        if head.tree is None or head.tree_digest is None:
            return None
        try:
            tree = read_tree(store, head.tree, head.tree_digest, run_folder(name), _is_wanted)
            texts = _texts(store, as_renewed(tree, head.ttl_s))
        except GoneError:  # a newer head counts by now
            if attempt == MAX_ATTEMPTS:
                raise
            continue
        if "run.json" not in tree.files:
            return None
        # The first sight has only the server's clock; later, what moved was moved just now.
        renewed_s = listed.modified_s if known is None else time.time()
        run = ListedRun(
            name,
            listed.modified_s,
            found.tag,
            LONG_AGO_S if head.is_released else renewed_s,
            {path: file.size_bytes for path, file in tree.files.items()},
            texts,
        )
        _keep(path, run)
        return run
    raise AssertionError


def _is_wanted(path: str) -> bool:
    return READ.fullmatch(path) is not None or COUNTED.fullmatch(path) is not None


def _texts(store: ObjectStore, tree: Tree) -> dict[str, str]:
    """What the files hold that are read. Raises GoneError or StorageError."""
    texts = {}
    for path, file in tree.files.items():
        if READ.fullmatch(path) is not None:
            content = read_small_file(store, file) if file.key else file.inline
            texts[path] = content.decode(errors="replace")
    return texts


def _known(path: Path, name: str) -> ListedRun | None:
    try:
        told = required_fields(read_json(path, LIMITS), path, FIELDS)
    except (FileNotFoundError, DataFormatError):
        return None
    return ListedRun(name, **{field: told[field] for field in FIELDS})


def _keep(path: Path, run: ListedRun) -> None:
    """Not flushed: it is no more than what was read."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps({field: getattr(run, field) for field in FIELDS}))
    beside.replace(path)


def _forget_others(folder: Path, names: set[str]) -> None:
    for path in folder.glob("*/*.json"):
        if f"{path.parent.name}/{path.stem}" not in names:
            path.unlink(missing_ok=True)
