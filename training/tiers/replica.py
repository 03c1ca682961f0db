"""Keep the bucket's copy of a run up to date while it is written on the scratch disk.

Training, and every stage after it, writes its folder as always, as durably and as fast. Beside it
one thread looks at the folder, and brings what is new into the bucket as a whole: files,
verification, the tree, then the swap of the head; what the tree no longer names is deleted last.
So the bucket holds the folder as it was at some moment, never a mixture; it is one such moment
behind at most, and skips those that are over.

No call to the bucket is made in the thread that entered it, but for the first and the last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from holdfast.training.checkpointing.digests import digest_of, file_parts
from holdfast.training.errors import HoldfastError, InputError, LeaseLostError, StorageError
from holdfast.training.runs.durable_json import json_bytes, storage_error
from holdfast.training.runs.faultpoints import reach
from holdfast.training.runs.lease_view import (
    FORMAT_VERSION,
    UNKNOWN,
    generation_path,
    newest_generation,
)
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.process_identity import ProcessIdentity
from holdfast.training.storage.protocol import PART_BYTES, ObjectStore
from holdfast.training.tiers.bandwidth import Sending, Throttle, never, note_bandwidth
from holdfast.training.tiers.brought import Brought
from holdfast.training.tiers.folder_image import (
    Identity,
    Image,
    is_growing,
    look_at,
    take_image,
)
from holdfast.training.tiers.head import RENEWALS_PER_TTL, HeadLease, run_folder
from holdfast.training.tiers.late_files import LateFiles, absent_files, put_off
from holdfast.training.tiers.restoring import note_base, restore_folder
from holdfast.training.tiers.scratch import address_of, replica_folder, run_name
from holdfast.training.tiers.transfer import read_tree, upload_file
from holdfast.training.tiers.tree import INLINE_BYTES, Tree, TreeFile, has_checkpoints

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
KEEP_DROPPED_S = 60.0
"""What is no longer named is deleted this much later: somebody may be reading it."""
FILES_AT_ONCE = 8
RETRY_S = 2.0
SOME_BYTES, SLOW_S = 256 * 1024, 1.0
"""What is small tells how long requests take, unless it takes long."""
WEIGHTY = ("checkpoints", "candidates", "bundle", "evaluation.json", "promotion.json")
Tell = Callable[[str], None]


class Replica:
    """The copy of one run in a bucket, kept by the holder of its head.

    Attributes:
        head: the lease.
        tell: whom it tells what a person should know, in one line.
        bytes_per_s: how fast the bucket took the last state that had more than a part; None before.
    """

    def __init__(  # a run, its place, and who is told
        self,
        store: ObjectStore,
        run: RunDirectory,
        head: HeadLease,
        tell: Tell = lambda _: None,
        throttle: Throttle | None = None,
    ) -> None:
        self.head = head
        self.bytes_per_s: float | None = None
        self.tell = tell
        self._throttle = throttle or Throttle()
        self._sending: Sending | None = None
        self._store, self._run = store, run
        self._name = run_name(run)
        self._tree = Tree()
        self._known: dict[tuple[str, Identity], TreeFile] = {}
        self._looked: dict[str, Identity] = {}
        self._brought_up_s = float("-inf")
        self._num_images = 0
        self._dropped: list[tuple[float, str]] = []
        self._is_failing = False
        self._is_delete_refused = False
        self._should_stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name="holdfast-replica", daemon=True)
        self._late_files = LateFiles(store, run, lambda: self._tree, head.check)
        self._brought = Brought(store, run, self._folder())

    def restore(self, *, can_begin_early: bool = False) -> None:
        """Make the run's folder what the bucket has, and delete what dead holders left there.

        Where training ``can_begin_early``, older checkpoints come once this is started. Raises
        StorageError, DataFormatError.
        """
        head = self.head.head
        if head.tree is not None:
            assert head.tree_digest is not None
            tree = read_tree(self._store, head.tree, head.tree_digest, run_folder(self._name))
            later = put_off(tree) if can_begin_early else frozenset()
            restore_folder(self._store, tree, head.tree_digest, self._run, self.tell, later)
            self._tree = tree
        self._sweep()

    def start(self) -> None:
        """Begin to keep the bucket up to date, and to read what is still to come."""
        self._thread.start()
        self._late_files.start()

    def finish(self, patience_s: float, *, is_urgent: bool = False) -> None:
        """Bring up the folder as it is now; the bucket has it all after return.

        Tried again for ``patience_s`` where it fails. Where it ``is_urgent``, as after a notice, no
        limit is kept to, and an older state that is still on its way is given up if the newest has
        time to get there alone, and not both. Raises StorageError, or LeaseLostError.
        """
        self._should_stop.set()
        self._late_files.stop()
        if is_urgent:
            self._throttle.lift()
            self._make_way(patience_s)
        if self._thread.ident is not None:
            self._thread.join()
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                self._bring_up(is_final=True)
                self._drop(self._brought.left_over(self._tree))
                self._delete_dropped(older_than_s=0.0)
                return
            except (StorageError, InputError) as error:  # that the bucket is gone is one of these
                if time.monotonic() >= deadline_s:
                    raise StorageError(
                        f"the store does not have the end of {self._name}: {error}. It is whole on "
                        f"this machine, at {self._run.path}: resume the run here once the store "
                        f"answers"
                    ) from error
                time.sleep(min(RETRY_S, max(0.0, deadline_s - time.monotonic())))

    def _make_way(self, patience_s: float) -> None:
        sending, speed = self._sending, self.bytes_per_s
        if sending is None or speed is None:
            return
        known = {identity for _, identity in self._known}
        now = look_at(self._run.path)
        newest_s = sum(one[1] for one in now.values() if one not in known) / speed
        if newest_s <= patience_s < newest_s + sending.left_bytes / speed:
            sending.give_up()

    def bring_up(self) -> None:
        """Bring up the folder as it is now, once. Raises StorageError or LeaseLostError."""
        self._bring_up(is_final=True)

    def _keep_up(self) -> None:
        while not self._should_stop.wait(LOOK_EVERY_S):
            try:
                self.head.check()
                if self._is_due():
                    self._bring_up(is_final=False)
                    self._delete_dropped(KEEP_DROPPED_S)
                self._tell_recovery()
            except LeaseLostError as error:
                self._yield_to_winner(error)
                return
            except (HoldfastError, OSError) as error:
                if not self._should_stop.is_set():
                    self._tell_failure(error)
                self._should_stop.wait(RETRY_S)

    def _is_due(self) -> bool:
        now = look_at(self._run.path)
        if "run.json" not in now or now == self._looked:
            return False
        if _weighty(now) != _weighty(self._looked):
            return True
        every_s = self.head.head.ttl_s / RENEWALS_PER_TTL
        return time.monotonic() - self._brought_up_s >= every_s

    def _bring_up(self, *, is_final: bool) -> None:
        """One image of the folder into the bucket. Raises StorageError or LeaseLostError."""
        if not self._run.run_json.is_file():
            return  # the run was refused before it began
        start_s = time.monotonic()
        self._num_images += 1
        image = take_image(self._run.path, replica_folder(self._run) / "image")
        try:
            self._require_checkpoints(image)
            has_news = is_final or _weighty(image.identities) != _weighty(self._looked)
            files, num_bytes = self._uploaded(image, has_news=has_news)
            absent = self._still_to_come(image)
        finally:
            self._sending = None
            image.drop()
        self._commit(Tree({**files, **absent}), is_whole=not absent)
        self._looked, self._brought_up_s = dict(image.identities), time.monotonic()
        duration_s = time.monotonic() - start_s
        if num_bytes > PART_BYTES or (num_bytes > SOME_BYTES and duration_s > SLOW_S):
            self._note_speed(num_bytes / duration_s)

    def _still_to_come(self, image: Image) -> dict[str, TreeFile]:
        try:
            return absent_files(
                self._tree, image.links, lambda path: image.links[path].read_bytes()
            )
        except OSError as error:
            raise storage_error("read", image.folder, error) from error

    def _require_checkpoints(self, image: Image) -> None:
        """A folder that somebody empties is no newer state: a run's last checkpoint never goes."""
        if has_checkpoints(self._tree.files) and not has_checkpoints(image.identities):
            raise StorageError(
                f"{self._run.path} has lost its checkpoints, so the store keeps those that it has; "
                f"resume the run, which reads them from there"
            )

    def _note_speed(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        address = address_of(self._run.path.parent.parent)
        if address is not None:
            note_bandwidth(address, bytes_per_s)

    def _uploaded(self, image: Image, *, has_news: bool) -> tuple[dict[str, TreeFile], int]:
        """All files of an image, each in the bucket; and how many bytes were sent."""
        files: dict[str, TreeFile] = {}
        new: list[str] = []
        for path, identity in image.identities.items():
            known = self._known.get((path, identity))
            if known is None and not has_news and is_growing(path) and identity[1] > INLINE_BYTES:
                known = self._tree.files.get(path)  # its end comes with the next checkpoint
            if known is None:
                new.append(path)
            else:
                files[path] = known
        folder = f"{self._folder()}/{self._num_images:06d}"
        sizes = {path: image.identities[path][1] for path in new}
        self._sending = sending = Sending(sum(sizes.values()), self._throttle)

        def upload(path: str, is_over: Callable[[], bool] = never) -> TreeFile:
            self.head.check()
            reach("store.before-file")

            def before_part(num_bytes: int) -> None:
                reach("store.before-part")
                sending.before_part(num_bytes, is_over)

            return self._sent(image.links[path], f"{folder}/{path}", path, before_part)

        reach("store.before-files")
        small = [path for path in new if sizes[path] <= PART_BYTES]
        with ThreadPoolExecutor(FILES_AT_ONCE, "holdfast-upload") as pool:
            files |= zip(small, pool.map(upload, small), strict=True)
        for path in self._brought.in_order(path for path in new if path not in files):
            left_bytes = sending.left_bytes - sizes[path]
            files[path] = self._brought.or_sent(path, image.links[path], partial(upload, path))
            sending.left_bytes = left_bytes
        reach("store.after-files")
        for path in new:
            self._known[path, image.identities[path]] = files[path]
        self._known = {key: file for key, file in self._known.items() if key[0] in files}
        return files, sum(files[path].size_bytes for path in new if files[path].key)

    def _sent(
        self, link: Path, key: str, path: str, before_part: Callable[[int], None]
    ) -> TreeFile:
        """A file in the bucket; what the last tree has with the same bytes is not sent again."""
        before = self._tree.files.get(path)
        if before is not None and before.key and before.size_bytes == link.stat().st_size:
            hasher = digest_of(file_parts(link))
            if hasher == before.digest:
                return before
        return upload_file(self._store, link, key, before_part)

    def _commit(self, tree: Tree, *, is_whole: bool) -> None:
        content = tree.to_bytes()
        digest = digest_of([content])
        before = self.head.head
        if digest == before.tree_digest:
            return
        key = f"{self._folder()}/{self._num_images:06d}/tree.json"
        reach("store.before-tree")
        self._store.put(key, content, "any")
        reach("store.before-swap")
        self.head.commit(key, digest)
        reach("store.after-swap")
        note_base(self._run, digest, is_whole=is_whole)
        gone = self._tree.keys() - tree.keys()
        gone |= {before.tree} if before.tree else set()
        self._drop(gone | self._brought.useless(tree))
        self._tree = tree

    def _drop(self, keys: Set[str]) -> None:
        now_s = time.monotonic()
        self._dropped += [(now_s, key) for key in sorted(keys)]

    def _folder(self) -> str:
        return f"{run_folder(self._name)}/{self.head.head.folder}"

    def _delete_dropped(self, older_than_s: float) -> None:
        limit_s = time.monotonic() - older_than_s
        doomed = [key for dropped_s, key in self._dropped if dropped_s <= limit_s]
        if not doomed:
            return
        reach("store.before-delete")
        try:
            self._store.delete(doomed)
        except StorageError as error:
            if not self._is_delete_refused:
                self.tell(f"old objects stay in the store, and are deleted later: {error}")
            self._is_delete_refused = True
        else:
            self._is_delete_refused = False
            self._dropped = [entry for entry in self._dropped if entry[1] not in set(doomed)]
        reach("store.after-delete")

    def _sweep(self) -> None:
        """Delete what the head does not name: earlier holders left it. Safe, however late."""
        head = self.head.head
        named = self._tree.keys() | ({head.tree} if head.tree else set())
        try:
            listed = self._store.list(run_folder(self._name))
            doomed = [
                entry.key
                for entry in listed
                if entry.key not in named and not entry.key.startswith(f"{self._folder()}/")
            ]
            self._store.delete(doomed)
        except StorageError as error:
            self.tell(f"what earlier writers left in the store stays there: {error}")

    def _yield_to_winner(self, error: LeaseLostError) -> None:
        """Let the processes that write the folder here see that another machine has the run."""
        self.tell(str(error))
        winner = self.head.winner or UNKNOWN
        for directory in (self._run, RunDirectory(self._run.path / ".engine")):
            _write_foreign_lease(directory, winner, self.head.head.ttl_s)

    def _tell_failure(self, error: Exception) -> None:
        if not self._is_failing:
            self.tell(f"the store is behind, training goes on: {error}")
        self._is_failing = True

    def _tell_recovery(self) -> None:
        if self._is_failing:
            self._is_failing = False
            self.tell("the store answers again, and has what is saved")


def _weighty(found: Mapping[str, Identity]) -> set[tuple[str, int]]:
    """What does not wait for the next renewal: everything but records that change all the time."""
    return {
        (path, identity[0]) for path, identity in found.items() if path.partition("/")[0] in WEIGHTY
    }


def _write_foreign_lease(run: RunDirectory, winner: ProcessIdentity, ttl_s: float) -> None:
    """The next generation of a local lease, held by a process of another machine."""
    if not run.lease.is_dir():
        return
    content = json_bytes(
        {
            **asdict(winner),
            "format_version": FORMAT_VERSION,
            "token": "store",
            "ttl_s": ttl_s,
            "acquired_at": time.time(),
            "released_at": None,
        }
    )
    path = generation_path(run, newest_generation(run) + 1)
    try:
        path.write_bytes(content)
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error.strerror)
