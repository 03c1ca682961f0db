"""The head of a run in a bucket: lease and commits in one small object, moved by compare-and-swap.

Looking at a lease and then writing is no fence: a holder that falls asleep in between writes when
it wakes up. Here what is written under a name that is never used again counts only once the head
names it, and the head moves only for the holder whose tag is still the newest. One who slept loses
that swap, and leaves nothing but objects that nobody names.

A holder is presumed dead when the head's tag has not changed for the lease's time on the watcher's
own monotonic clock: no clock is compared with another machine's.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.errors import (
    DataFormatError,
    HoldfastError,
    InputError,
    LeaseHeldError,
    LeaseLostError,
    StorageError,
)
from holdfast.training.runs.lease_view import MAX_TTL_S
from holdfast.training.runs.process_identity import ProcessIdentity, current_process, presence
from holdfast.training.runs.shown_text import shown
from holdfast.training.runs.stored_json import Kinds, Limits, parse_json, required_fields
from holdfast.training.storage.protocol import Listed, Listing, ObjectStore, Unchanged
from holdfast.training.tiers.tree import NAME

FORMAT_VERSION = 1
HEAD_TTL_S = 20.0
RENEWALS_PER_TTL = 4
LOOK_EVERY_S = 1.0
MAX_ATTEMPTS = 3
HEADS, RUNS = "heads", "runs"
LIMITS = Limits(max_bytes=2**16, max_depth=4)
TOKEN = re.compile(r"[0-9a-f]{16}")
FIELDS: Kinds = {
    "format_version": (int,),
    "generation": (int,),
    "token": (str,),
    "nonce": (str,),
    "holder": (dict,),
    "ttl_s": (float,),
    "is_released": (bool,),
    "tree": (str, type(None)),
    "tree_digest": (str, type(None)),
    "digest": (str, type(None)),
}
HOLDER: Kinds = {
    "host": (str,),
    "boot_id": (str,),
    "pid_namespace": (str,),
    "pid": (int,),
    "pid_start": (int,),
}


@dataclass(frozen=True)
class Head:
    """What the head object says.

    Attributes:
        generation: how many holders the run has had.
        token: of the holder, drawn when it took the lease.
        nonce: of this very write, so that no two contents are equal.
        holder: the process that holds the lease.
        tree: key of the tree that counts; None before the first commit.
    """

    generation: int
    token: str
    nonce: str
    holder: ProcessIdentity
    ttl_s: float
    is_released: bool
    tree: str | None
    tree_digest: str | None

    @property
    def folder(self) -> str:
        """What this holder's keys begin with, below those of the run."""
        return f"{self.generation:08d}-{self.token}"

    @property
    def told_holder(self) -> str:
        """The holder in words."""
        return f"process {self.holder.pid} on {shown(self.holder.host, 255)}"

    def to_bytes(self) -> bytes:
        """As it is stored, with a digest of the rest: a bit that flips on the way back is seen.

        Otherwise the next holder would write it into its own head.
        """
        told = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**told, "digest": _digest_of(told)}, indent=1).encode()


def head_key(name: str) -> str:
    """The key of the head of a run, ``experiment/run_id``. All heads lie in one folder."""
    return f"{HEADS}/{name}.json"


def run_folder(name: str) -> str:
    """What the keys of all other objects of a run begin with."""
    return f"{RUNS}/{name}"


def name_of(listed: Listed) -> str:
    """The run whose head was listed."""
    return listed.key.removeprefix(f"{HEADS}/").removesuffix(".json")


def listed_heads(store: ObjectStore) -> Listing:
    """The heads of all runs. Raises as ``ObjectStore.list`` does."""
    return [listed for listed in store.list(HEADS) if _is_run(name_of(listed))]


def _is_run(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(NAME.fullmatch(part) and part[0] != "." for part in parts)


def read_head(store: ObjectStore, name: str) -> tuple[Head, str] | None:
    """The head of a run and its tag; None where there is none. Raises DataFormatError."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        found = store.get(head_key(name))
        if found is None:
            return None
        try:
            return parse_head(found.content, name), found.tag
        except DataFormatError:  # it may have been altered on its way here
            if attempt == MAX_ATTEMPTS:
                raise
    raise AssertionError


def _digest_of(told: Mapping[str, Any]) -> str:
    return digest_of([json.dumps(told, sort_keys=True).encode()])


def parse_head(content: bytes, name: str) -> Head:
    """The head that bytes hold. Raises DataFormatError that says what is wrong."""
    source = f"the head of {name}"
    if len(content) > LIMITS.max_bytes:
        raise DataFormatError(f"{source} has {len(content):,} bytes; it was not made by Holdfast")
    read = required_fields(parse_json(content, source, LIMITS), source, FIELDS)
    told = {"tree": None, "tree_digest": None, **read}
    digest = told.pop("digest", None)
    is_unaltered = digest in (None, _digest_of(told))
    if told.pop("format_version") != FORMAT_VERSION:
        raise DataFormatError(f"{source} is of another format version; use the newest Holdfast")
    holder = required_fields(told["holder"], source, HOLDER)
    tree = told["tree"]
    is_good = (
        is_unaltered
        and told["generation"] > 0
        and TOKEN.fullmatch(told["token"])
        and 0 < told["ttl_s"] <= MAX_TTL_S
        and (tree is None or tree.startswith(f"{run_folder(name)}/"))
        and (tree is None) == (told["tree_digest"] is None)
    )
    if not is_good:
        raise DataFormatError(f"{source} does not hold what Holdfast writes there; restore it")
    names = {entry.name for entry in fields(Head)}
    return Head(
        **{
            **{key: value for key, value in told.items() if key in names},
            "holder": ProcessIdentity(**{key: holder[key] for key in HOLDER}),
        }
    )


class HeadLease:
    """The right to write one run of a bucket, held by this process.

    Attributes:
        generation: number of this holder among all that the run had.
        head: as it was last moved.
        lost: why this process is no longer the holder; None while it is, as far as is known.
        winner: the process that took over, where one did.
    """

    def __init__(self, store: ObjectStore, name: str, head: Head, tag: str) -> None:
        """For ``acquire``, which is how a lease is taken."""
        self.head = head
        self.lost: str | None = None
        self.winner: ProcessIdentity | None = None
        self._store, self._name, self._tag = store, name, tag
        self._moved_s = time.monotonic()
        self._mutex = threading.Lock()
        self._should_stop = threading.Event()
        self._thread = threading.Thread(
            target=self._renew_until_stopped, name="holdfast-head", daemon=True
        )

    @classmethod
    def acquire(
        cls,
        store: ObjectStore,
        name: str,
        ttl_s: float = HEAD_TTL_S,
        *,
        wait_s: float = 0.0,
        identity: ProcessIdentity | None = None,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> HeadLease:
        """Become the one writer of the run; a thread renews the lease after return.

        Args:
            store: the bucket.
            name: ``experiment/run_id``.
            ttl_s: without a renewal for this long, another may take over.
            wait_s: how long to wait for a holder that is seen to live. One that may be dead is
                watched for the time of its lease in any case.
            identity: who asks; this process, unless a test plays another machine.
            on_wait: told once what is waited for.

        Raises:
            LeaseHeldError: another process writes this run.
            StorageError: the bucket does not answer.
        """
        me = identity or current_process()
        deadline_s = time.monotonic() + wait_s
        while True:
            known = read_head(store, name)
            is_held = known is not None and not _is_free(known[0], me)
            if is_held and not _is_dead(store, name, known, on_wait):
                cls._wait_or_refuse(store, name, me, deadline_s)
                continue
            lease = cls._take(store, name, ttl_s, me, known)
            if lease is not None:
                lease._thread.start()
                return lease

    @staticmethod
    def _wait_or_refuse(
        store: ObjectStore, name: str, me: ProcessIdentity, deadline_s: float
    ) -> None:
        known = read_head(store, name)
        if known is None or _is_free(known[0], me):
            return
        if time.monotonic() >= deadline_s:
            raise LeaseHeldError(
                f"{name} is being written by {known[0].told_holder}, which renews its lease: wait, "
                f"or stop that process"
            )
        time.sleep(min(LOOK_EVERY_S, max(0.0, deadline_s - time.monotonic())))

    @classmethod
    def _take(
        cls,
        store: ObjectStore,
        name: str,
        ttl_s: float,
        identity: ProcessIdentity,
        known: tuple[Head, str] | None,
    ) -> HeadLease | None:
        """One attempt; None where another was faster."""
        before = None if known is None else known[0]
        head = Head(
            generation=1 if before is None else before.generation + 1,
            token=secrets.token_hex(8),
            nonce=secrets.token_hex(8),
            holder=identity,
            ttl_s=ttl_s,
            is_released=False,
            tree=None if before is None else before.tree,
            tree_digest=None if before is None else before.tree_digest,
        )
        expected = "absent" if known is None else Unchanged(known[1])
        tag = store.put(head_key(name), head.to_bytes(), expected)  # type: ignore[arg-type]
        return None if tag is None else cls(store, name, head, tag)

    def commit(self, tree: str, tree_digest: str) -> None:
        """Let this tree count. All that it names must be in the bucket, and verified.

        Raises:
            LeaseLostError: another process holds the lease; nothing was changed.
            StorageError: the bucket does not answer; it may have happened, and may be tried again.
        """
        self._move(tree=tree, tree_digest=tree_digest)

    def renew(self) -> None:
        """Show that this process lives. Raises as ``commit`` does."""
        self._move()

    def check(self) -> None:
        """Raise LeaseLostError where it is known that another process took over."""
        if self.lost is not None:
            raise LeaseLostError(
                f"this process no longer writes {self._name}: {self.lost}; nothing was changed "
                f"since, and the run can be continued by starting it again"
            )

    def release(self) -> None:
        """Let the next one begin at once. Never raises; where it fails, the lease runs out."""
        self._stop()
        with contextlib.suppress(HoldfastError):
            if self.lost is None and not self.head.is_released:
                self._move(is_released=True)

    def empty(self) -> None:
        """Let the head name nothing: from now on the run has no files. Raises as ``commit``."""
        self._move(tree=None, tree_digest=None)

    def remove(self) -> None:
        """Delete the head of a run that has nothing, as one that was refused before it began.

        A delete has no condition. So the lease is renewed right before it, and within the lease's
        time nobody else can have taken it. Never raises; where it fails, the lease is released.
        """
        assert self.head.tree is None, "what a head names would be lost with it"
        self._stop()
        with contextlib.suppress(HoldfastError):
            self._move()
            if time.monotonic() - self._moved_s < self.head.ttl_s / 2:
                self._store.delete([head_key(self._name)])
                self.lost = "it was removed"
        self.release()

    def _stop(self) -> None:
        self._should_stop.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _move(self, **changes: Any) -> None:
        with self._mutex:
            self.check()
            head = replace(self.head, nonce=secrets.token_hex(8), **changes)
            tag = self._store.put(head_key(self._name), head.to_bytes(), Unchanged(self._tag))
            if tag is None and (tag := self._resumed_tag(head)) is None:
                self.check()
            assert tag is not None
            self.head, self._tag, self._moved_s = head, tag, time.monotonic()

    def _resumed_tag(self, head: Head) -> str | None:
        """After a swap was refused: a write of ours whose answer was lost may have moved the tag.

        Then the swap is tried once more from there. Otherwise another process has moved the head.
        """
        found = read_head(self._store, self._name)
        if found is not None and (found[0].generation, found[0].token) == (
            head.generation,
            head.token,
        ):
            tag = self._store.put(head_key(self._name), head.to_bytes(), Unchanged(found[1]))
            if tag is not None:
                return tag
            found = read_head(self._store, self._name)
        self.winner = None if found is None else found[0].holder
        who = "its head was deleted" if found is None else f"{found[0].told_holder} took over"
        self.lost = f"{who} from generation {head.generation}"
        return None

    def _renew_until_stopped(self) -> None:
        every_s = self.head.ttl_s / RENEWALS_PER_TTL
        while not self._should_stop.wait(max(0.05, every_s - (time.monotonic() - self._moved_s))):
            if time.monotonic() - self._moved_s < every_s:
                continue  # a commit has shown that we live
            try:
                self.renew()
            except LeaseLostError:
                return
            except (StorageError, InputError):  # a bucket that is gone may come back, too
                self._should_stop.wait(min(1.0, every_s))  # others wait for the ttl, at least


def _is_free(head: Head, me: ProcessIdentity) -> bool:
    return head.is_released or presence(head.holder, me) == "gone"


def _is_dead(
    store: ObjectStore,
    name: str,
    known: tuple[Head, str] | None,
    on_wait: Callable[[str], None],
) -> bool:
    """Watch a holder for the time of its lease; False as soon as its head is moved."""
    assert known is not None
    head, tag = known
    start_s = time.monotonic()
    on_wait(f"watching for {head.ttl_s:g} s whether {head.told_holder} still writes {name}")
    while time.monotonic() - start_s < head.ttl_s:
        time.sleep(min(LOOK_EVERY_S, head.ttl_s / RENEWALS_PER_TTL))
        found = read_head(store, name)
        if found is None or found[1] != tag:
            return False
    return True
