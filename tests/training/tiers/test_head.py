from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from holdfast.training.errors import DataFormatError, LeaseHeldError, LeaseLostError, StorageError
from holdfast.training.runs.process_identity import ProcessIdentity, current_process
from holdfast.training.storage.protocol import Expected, Object
from holdfast.training.tiers.head import HeadLease, head_key, parse_head, read_head
from holdfast.training.tiers.letting_go import let_go_of_dead
from tests.contracts.memory_objects import MemoryObjects

NAME = "digits/first"
DIGEST = "blake3:" + "0" * 64
TTL_S = 0.4


def machine(name: str) -> ProcessIdentity:
    return replace(current_process(), host=name, boot_id=name)


def tree(number: int) -> str:
    return f"runs/{NAME}/{number}.json"


class Journal(MemoryObjects):
    """Remembers every head that was ever written, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[bytes] = []

    def _write(self, key: str, content: bytes) -> str:
        if key == head_key(NAME):
            self.heads.append(content)
        return super()._write(key, content)


class FallsAsleep:
    """The same objects, seen by a process that sleeps now and then just before it writes."""

    def __init__(self, store: MemoryObjects, rng: random.Random) -> None:
        self.has_checksums = store.has_checksums
        self.get, self.list, self.delete = store.get, store.list, store.delete
        self.upload = store.upload
        self._store, self._rng = store, rng

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        if self._rng.random() < 0.2:
            time.sleep(2 * TTL_S)
        return self._store.put(key, content, expected)


class LosesAnswers(MemoryObjects):
    """The next writes have their effect, and no answer."""

    num_lost = 0

    def put(self, key: str, content: bytes, expected: Expected) -> str | None:
        tag = super().put(key, content, expected)
        if self.num_lost > 0:
            self.num_lost -= 1
            raise StorageError("no answer")
        return tag


def test_the_first_takes_it_and_the_second_is_refused() -> None:
    store = MemoryObjects()
    first = HeadLease.acquire(store, NAME, TTL_S, identity=machine("a"))
    with pytest.raises(LeaseHeldError, match="on a, which renews its lease"):
        HeadLease.acquire(store, NAME, TTL_S, identity=machine("b"))
    first.commit(tree(1), DIGEST)
    first.release()
    second = HeadLease.acquire(store, NAME, TTL_S, identity=machine("b"))
    assert (second.head.generation, second.head.tree) == (2, tree(1))
    with pytest.raises(LeaseLostError, match=r"process \d+ on b took over from generation 1"):
        first.commit(tree(2), DIGEST)
    second.release()


def test_a_holder_that_sleeps_for_its_lease_loses_it_without_a_clock() -> None:
    store = MemoryObjects()
    first = HeadLease(store, NAME, *_taken(store))
    start_s = time.monotonic()
    second = HeadLease.acquire(store, NAME, TTL_S, identity=machine("b"))
    assert time.monotonic() - start_s >= TTL_S
    with pytest.raises(LeaseLostError):
        first.commit(tree(1), DIGEST)
    assert first.winner == machine("b")
    second.commit(tree(2), DIGEST)
    second.release()


def _taken(store: MemoryObjects) -> tuple[object, str]:
    """A head whose holder does not renew it."""
    held = HeadLease.acquire(store, NAME, TTL_S, identity=machine("a"))
    held._should_stop.set()
    held._thread.join()
    found = read_head(store, NAME)
    assert found is not None
    return found


def test_who_follows_a_holder_that_was_watched_from_elsewhere_need_not_watch_it() -> None:
    store = MemoryObjects()
    first = HeadLease(store, NAME, *_taken(store))
    tag = store.list("heads")[0].tag
    assert not let_go_of_dead(store, NAME, tag, TTL_S), "not watched for longer than its lease"
    assert not let_go_of_dead(store, NAME, "another", 2 * TTL_S)
    assert let_go_of_dead(store, NAME, tag, 2 * TTL_S)
    tag = store.list("heads")[0].tag
    assert not let_go_of_dead(store, NAME, tag, 2 * TTL_S), "it is let go of once"
    start_s = time.monotonic()
    second = HeadLease.acquire(store, NAME, TTL_S, identity=machine("b"))
    assert time.monotonic() - start_s < TTL_S / 2
    with pytest.raises(LeaseLostError, match="on b took over from generation 1"):
        first.commit(tree(1), DIGEST)
    second.release()


def test_a_holder_that_was_let_go_of_and_lives_takes_its_head_back() -> None:
    store = MemoryObjects()
    first = HeadLease(store, NAME, *_taken(store))
    assert let_go_of_dead(store, NAME, store.list("heads")[0].tag, 2 * TTL_S)
    first.commit(tree(1), DIGEST)
    found = read_head(store, NAME)
    assert found is not None
    assert (found[0].tree, found[0].generation, found[0].is_released) == (tree(1), 1, False)


def test_a_process_that_is_seen_to_be_gone_is_not_waited_for() -> None:
    store = MemoryObjects()
    gone = replace(current_process(), pid=2**22 + 1, pid_start=1)
    head, _ = _taken(store)
    store.put(head_key(NAME), replace(head, holder=gone, ttl_s=1000.0).to_bytes(), "any")
    start_s = time.monotonic()
    HeadLease.acquire(store, NAME, TTL_S).release()
    assert time.monotonic() - start_s < 1.0


def test_an_answer_that_was_lost_costs_nothing() -> None:
    store = LosesAnswers()
    lease = HeadLease.acquire(store, NAME, 100.0)
    store.num_lost = 1
    with pytest.raises(StorageError):
        lease.commit(tree(1), DIGEST)
    lease.commit(tree(2), DIGEST)
    found = read_head(store, NAME)
    assert found is not None
    assert found[0].tree == tree(2)
    lease.release()


@pytest.mark.parametrize("seed", range(3))
def test_five_that_fall_asleep_before_they_write_never_commit_one_step_twice(seed: int) -> None:
    store, end_s = Journal(), time.monotonic() + 4.0

    def contend(number: int) -> None:
        sleepy = FallsAsleep(store, random.Random(100 * seed + number))
        while time.monotonic() < end_s:
            try:
                lease = HeadLease.acquire(sleepy, NAME, TTL_S, identity=machine(f"m{number}"))
            except LeaseHeldError:
                continue
            try:
                step = int((lease.head.tree or tree(0)).rpartition("/")[2].split(".")[0])
                for _ in range(5):
                    step += 1
                    lease.commit(tree(step), DIGEST)
            except LeaseLostError:
                continue
            finally:
                lease.release()

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    heads = [parse_head(content, NAME) for content in store.heads]
    generations = [head.generation for head in heads]
    assert generations == sorted(generations)
    assert len({head.token for head in heads}) == len(set(generations))
    steps = [head.tree for one, head in pairwise(heads) if one.tree != head.tree]
    assert len(steps) >= 10
    assert steps == [tree(number) for number in range(1, len(steps) + 1)]


def test_a_bit_that_flips_on_the_way_is_never_taken_over_by_the_next_holder() -> None:
    store = MemoryObjects()
    held = HeadLease.acquire(store, NAME, TTL_S, identity=machine("a"))
    held.commit(tree(1), DIGEST)
    held.release()
    content = held.head.to_bytes()
    num_seen = 0
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        try:
            found = parse_head(flipped, NAME)
        except DataFormatError:
            num_seen += 1
        else:
            assert found == held.head  # it was in the name of the digest
    assert num_seen > len(content) - 10


def test_a_head_that_was_altered_once_is_read_again() -> None:
    class Flips(MemoryObjects):
        num_flips = 2

        def get(self, key: str, start: int = 0, end: int | None = None) -> Object | None:
            found = super().get(key, start, end)
            if found is None or self.num_flips == 0:
                return found
            self.num_flips -= 1
            return Object(found.content.replace(b'"generation": 1', b'"generation": 3'), found.tag)

    store = Flips()
    HeadLease.acquire(store, NAME, TTL_S).release()
    found = read_head(store, NAME)
    assert found is not None
    assert (found[0].generation, store.num_flips) == (1, 0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"generation": 0}, "does not hold what"),
        ({"token": "../x"}, "does not hold what"),
        ({"ttl_s": 1e9}, "does not hold what"),
        ({"tree": "runs/other/run/tree.json"}, "does not hold what"),
        ({"tree": tree(1)}, "does not hold what"),
        ({"format_version": 2}, "another format version"),
        ({"holder": {}}, "has no host"),
        ({"is_released": "yes"}, "is_released"),
        ({"ttl_s": 4.0}, "does not hold what"),
    ],
)
def test_a_head_that_nobody_of_ours_wrote_is_refused(
    change: dict[str, object], expected: str
) -> None:
    store = MemoryObjects()
    HeadLease.acquire(store, NAME, TTL_S).release()
    found = store.get(head_key(NAME))
    assert found is not None
    content = json.dumps({**json.loads(found.content), **change}).encode()
    with pytest.raises(DataFormatError, match=expected):
        parse_head(content, NAME)
