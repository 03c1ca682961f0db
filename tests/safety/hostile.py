"""What strangers put into files: made from seeds, so that a case that fails can be made again."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

HUGE_BYTES = 4 * 2**40
ESCAPES = "\x1b[2J\x1b[1;1Hdigits: all is right\r\nok\u202e\x07"
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -5, 1e300, -1e300, 10**299, 2**63, 0.5, "", "x", ESCAPES, "\ud800",
    "2026-13-45", "../../etc/passwd", "/dev/zero", [], {}, [[]], {"": {}}, ["x"], [None],
)  # fmt: skip
SPECIAL = ["fifo", "dangling", "zero", "loop", "folder", "sparse", "socket", "linked"]


@contextmanager
def within(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError in the block when it takes longer."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {limit_s} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def digest_of_tree(folder: Path) -> str:
    """Of names, kinds and bytes below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.lstat().st_mode}\n".encode())
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def put_special(path: Path, kind: str, elsewhere: Path) -> None:
    """Something that is no plain file, or a plain one that nobody can read whole."""
    path.unlink(missing_ok=True)
    links = {"dangling": "/nowhere/at/all", "zero": "/dev/zero", "loop": str(path)}
    if kind in links:
        path.symlink_to(links[kind])
    elif kind == "linked":
        path.symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:  # the address of a socket is short, the folder of a test is not
                server.bind(f"/proc/self/fd/{descriptor}/{path.name}")
            finally:
                os.close(descriptor)
    else:
        with path.open("wb") as file:
            file.truncate(HUGE_BYTES)


def remove(path: Path) -> None:
    """Whatever ``put_special`` has put there."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def odd_texts(rng: random.Random, value: Any) -> dict[str, bytes]:
    """JSON, or what is none, by the name of what was done to it."""
    good = json.dumps(value).encode()
    cut = rng.randrange(1, len(good))
    return {
        "empty": b"",
        "cut": good[:cut],
        "noise": rng.randbytes(200),
        "not utf-8": good[:-1] + b'"\xff":1}',
        "bom": b"\xef\xbb\xbf" + good,
        "lists": b"[" * 100_000,
        "objects": b'{"a":' * 100_000,
        "closed lists": b"[" * 5000 + b"]" * 5000,
        "nested": json.dumps(nested(value, 300)).encode(),
        "NaN": changed(rng, value, "@").replace(b'"@"', b"NaN"),
        "infinity": changed(rng, value, "@").replace(b'"@"', b"-Infinity"),
        "1e999": changed(rng, value, "@").replace(b'"@"', b"1e999"),
        "digits": changed(rng, value, "@").replace(b'"@"', b"9" * 5000),
        "scalar": b"5",
        "list": b"[1, 2]",
        "null": b"null",
        "twice": good[:-1] + b', "version": "x", "number": []}',
    }


def odd_values(rng: random.Random, value: Any, num: int) -> dict[str, bytes]:
    """The value with a leaf that is another thing, or is gone."""
    found = {}
    for number in range(num):
        odd = rng.choice(ODD_VALUES)
        found[f"{number}: {odd!r:.20}"] = changed(rng, value, odd)
    return found


def changed(rng: random.Random, value: Any, odd: Any) -> bytes:
    """JSON of the value with one of its places holding something else."""
    altered = copy.deepcopy(value)
    holder, key = rng.choice(list(places(altered)))
    if odd == "" and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = odd
    return json.dumps(altered).encode()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place within a value, as what holds it and its key there."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from places(item)


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = {"a": value}
    return value
