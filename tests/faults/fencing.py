"""A process that wants to write one run of a bucket, and falls asleep between looking and writing.

    python -m tests.faults.fencing ADDRESS SEED SECONDS

Each commit is one step on from the newest that it knows of, and is printed with the generation.
"""

from __future__ import annotations

import random
import sys
import time

from holdfast.training.errors import LeaseHeldError, LeaseLostError
from holdfast.training.storage.address import parse_address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import Expected, ObjectStore
from holdfast.training.tiers.head import HeadLease, head_key, run_folder

NAME = "digits/first"
DIGEST = "blake3:" + "0" * 64
TTL_S = 0.6


class FallsAsleep:
    """A store, seen by a process that sleeps now and then just before it writes the head."""

    def __init__(self, store: ObjectStore, rng: random.Random) -> None:
        self.has_checksums = store.has_checksums
        self.get, self.list, self.delete = store.get, store.list, store.delete
        self.upload = store.upload
        self._store, self._rng = store, rng

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        if key == head_key(NAME) and self._rng.random() < 0.2:
            time.sleep(2 * TTL_S)
        return self._store.put(key, content, expected)


def step_of(tree: str | None) -> int:
    """The step that a tree's key stands for."""
    return 0 if tree is None else int(tree.rpartition("/")[2].split(".")[0])


def contend(store: ObjectStore, end_s: float) -> None:
    """Take the lease, commit some steps, release it; again and again."""
    while time.monotonic() < end_s:
        try:
            lease = HeadLease.acquire(store, NAME, TTL_S)
        except LeaseHeldError:
            continue
        try:
            for _ in range(5):
                step = step_of(lease.head.tree) + 1
                key = f"{run_folder(NAME)}/{lease.head.folder}/{step}.json"
                store.put(key, key.encode(), "any")
                lease.commit(key, DIGEST)
                print(step, lease.head.generation, flush=True)
        except LeaseLostError:
            print("lost", flush=True)
        finally:
            lease.release()


if __name__ == "__main__":
    address, seed, for_s = sys.argv[1:]
    objects = FallsAsleep(open_store(parse_address(address)), random.Random(seed))
    contend(objects, time.monotonic() + float(for_s))
