"""A store in a bucket that is kept in order.

A run leaves at one stroke: whoever deletes it takes its head, lets it name nothing, deletes the
objects, and last the head. A delete has no condition; so the head goes only while its lease, which
nobody else can take within its time, has just been renewed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from holdfast.training.bundles.bucket_registry import BUNDLES, BucketRegistry
from holdfast.training.errors import (
    InputError,
    LeaseHeldError,
    RunConflictError,
    StorageError,
)
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.probe import FOLDER as PROBES
from holdfast.training.storage.probe import server_time_s
from holdfast.training.storage.protocol import Listed, ObjectStore
from holdfast.training.storage.unfinished import UnfinishedUploads
from holdfast.training.tiers.head import HEADS, RUNS, Head, HeadLease, name_of, read_head
from holdfast.training.tiers.head import run_folder as keys_of
from holdfast.training.tiers.transfer import read_tree
from holdfast.training.tiers.viewing import refresh_view
from holdfast.training.upkeep.census import run_folders, seen_run, seen_versions
from holdfast.training.upkeep.plan import StoredRun, StoredVersion
from holdfast.training.upkeep.shelves import ABANDONED_S


class BucketShelf:
    """A store in a bucket. ``store`` is for tests; it is opened where there is none.

    Only where it is opened here, parts of unfinished uploads are looked for, too.
    """

    def __init__(self, address: Address, store: ObjectStore | None = None) -> None:
        self._address, self._is_opened_here = address, store is None
        self._store = store or open_store(address)
        self._registry = BucketRegistry(address, self._store)
        self.unseen = ""

    def now_s(self) -> float:
        """As ``Shelf.now_s``: the server's."""
        return server_time_s(self._store)

    def runs(self) -> list[StoredRun]:
        """As ``Shelf.runs``."""
        root = refresh_view(self._address)
        heads = {name_of(listed): listed for listed in self._store.list(HEADS)}
        found = []
        for run in run_folders(root):
            name = f"{run.path.parent.name}/{run.path.name}"
            if name in heads:
                known = read_head(self._store, name)
                tree = known[0].tree if known is not None else None
                found.append(seen_run(run, heads[name].modified_s, tree or ""))
        return found

    def versions(self) -> list[StoredVersion]:
        """As ``Shelf.versions``."""
        published_s = {}
        for entry in self._store.list("registry"):
            parts = entry.key.removesuffix(".json").split("/")
            if len(parts) == 4 and parts[2] == "versions" and parts[3].isdecimal():
                published_s[parts[1], int(parts[3])] = entry.modified_s
        return seen_versions(self._registry, published_s)

    def remove(self, doomed: StoredRun | StoredVersion) -> int:
        """As ``Shelf.remove``."""
        if isinstance(doomed, StoredVersion):
            return self._remove_version(doomed)
        head = HeadLease.acquire(self._store, doomed.name)
        try:
            if (head.head.tree or "") != doomed.tree:
                raise RunConflictError(f"{doomed.name} was changed since it was looked at")
            return self._emptied(doomed.name, head)
        finally:
            head.release()

    def _emptied(self, name: str, head: HeadLease) -> int:
        """Let a head that is held name nothing, and delete all that the run has."""
        head.empty()
        listed = self._store.list(keys_of(name))
        head.check()
        self._store.delete([entry.key for entry in listed])
        head.remove()
        return sum(entry.size_bytes for entry in listed)

    def _remove_version(self, doomed: StoredVersion) -> int:
        tree = self._registry.tree(doomed.name, doomed.version)
        if tree is None:
            return 0
        self._registry.withdraw(doomed.name, doomed.version)
        self._store.delete(sorted(tree.keys()))
        return sum(file.size_bytes for file in tree.files.values())

    def sweep(self, *, is_dry_run: bool) -> tuple[int, int]:
        """As ``Shelf.sweep``: objects that nobody names, and heads that name nothing."""
        limit_s = self.now_s() - ABANDONED_S
        # Objects before heads: a run that begins in between has its head before its objects.
        of_runs, listed = defaultdict(list), self._store.list(RUNS)
        for entry in listed:
            of_runs["/".join(entry.key.split("/")[1:3])].append(entry)
        heads = {name_of(entry): entry for entry in self._store.list(HEADS)}
        found: list[Listed] = []
        for name, head in sorted(heads.items()):
            is_old = head.modified_s < limit_s
            old = [entry for entry in of_runs[name] if entry.modified_s < limit_s]
            found += self._swept_run(name, old, is_old=is_old, is_dry_run=is_dry_run)
        lone = [entry for entry in self._lone(of_runs, heads) if entry.modified_s < limit_s]
        if not is_dry_run:
            self._store.delete([entry.key for entry in lone])
        found += lone
        sizes = [entry.size_bytes for entry in found]
        sizes += self._swept_parts(limit_s, is_dry_run=is_dry_run)
        return len(sizes), sum(sizes)

    def _swept_parts(self, limit_s: float, *, is_dry_run: bool) -> list[int]:
        """Of uploads that never ended, the bytes of each; where they are not seen, that is kept."""
        if not self._is_opened_here:
            return []
        try:
            uploads = UnfinishedUploads(self._address)
            old = [upload for upload in uploads.list() if upload.begun_s < limit_s]
            for upload in () if is_dry_run else old:
                uploads.abandon(upload)
        except (InputError, StorageError) as error:
            self.unseen = str(error)
            return []
        return [upload.size_bytes for upload in old]

    def _lone(
        self, of_runs: Mapping[str, list[Listed]], heads: Mapping[str, Listed]
    ) -> Iterator[Listed]:
        """Objects that belong to no run and to no bundle that there is."""
        for name, entries in of_runs.items():
            yield from entries if name not in heads else ()
        yield from self._store.list(PROBES)
        bundles = self._store.list(BUNDLES)
        named = set()
        for name in self._registry.names():
            for version in self._registry.versions(name):
                tree = self._registry.tree(name, version)
                named |= tree.keys() if tree is not None else set()
        yield from (entry for entry in bundles if entry.key not in named)

    def _swept_run(
        self, name: str, old: Iterable[Listed], *, is_old: bool, is_dry_run: bool
    ) -> list[Listed]:
        """Of a run's old objects those that its head does not name; deleted as its holder.

        A head that ``is_old`` was not renewed for a day: its holder is dead.
        """
        known = read_head(self._store, name)
        if known is None or not (known[0].is_released or is_old):
            return []
        named = self._named(name, known[0])
        orphans = [entry for entry in old if entry.key not in named]
        if is_dry_run or not (orphans or known[0].tree is None):
            return orphans
        try:
            head = HeadLease.acquire(self._store, name)
        except LeaseHeldError:
            return []
        try:
            if head.head.tree is None:
                self._emptied(name, head)
            else:
                named = self._named(name, head.head)
                orphans = [entry for entry in orphans if entry.key not in named]
                self._store.delete([entry.key for entry in orphans])
        finally:
            head.release()
        return orphans

    def _named(self, name: str, head: Head) -> set[str]:
        if head.tree is None or head.tree_digest is None:
            return set()
        tree = read_tree(self._store, head.tree, head.tree_digest, keys_of(name))
        return {head.tree, *tree.keys()}
