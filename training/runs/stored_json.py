"""The one way in which a file that lies in a store is read: as if a stranger had put it there.

Only a plain file is opened: no link is followed, a FIFO or a device never waits for anybody. How
much is read, how deep it nests and how large its numbers are has a limit, so that reading ends,
and soon. Whatever is wrong is one error that names the file.

Imports the standard library and the error tree alone.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.training.errors import DataFormatError, HoldfastError, StorageError, kind_of

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import Json

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC
KIND_NAMES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NOT_OURS = (
    "it was not written by Holdfast, or the disk lost part of it: restore it from a backup or "
    "move it away"
)
Kinds = Mapping[str, tuple[type, ...]]


@dataclass(frozen=True)
class Limits:
    """What is read at most; a list in a list has the depth 2. Every float holds 300 digits."""

    max_bytes: int = 16 * 2**20
    max_depth: int = 100
    max_digits: int = 300


RECORD = Limits()
STATE = Limits(max_bytes=2**30, max_depth=900, max_digits=4300)
"""Of a checkpoint's ``state.json``: it holds the history of a run, and what users keep."""


def read_json(path: Path, limits: Limits = RECORD) -> Json:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it cannot be read.
        DataFormatError: it is no plain file, too large, or not UTF-8 JSON of finite numbers; the
            message names the file and what is wrong.
    """
    content, _ = read_plain_file(path, limits.max_bytes)
    return parse_json(content, str(path), limits)


def read_plain_file(path: Path, max_bytes: int) -> tuple[bytes, os.stat_result]:
    """The bytes of a plain file, and what the system says of it. Raises as ``read_json`` does."""
    descriptor = open_plain_file(path)
    try:
        status = os.fstat(descriptor)
        if status.st_size > max_bytes:
            raise DataFormatError(
                f"{path} has {status.st_size:,} bytes, at most {max_bytes:,} are expected; "
                f"{NOT_OURS}"
            )
        with os.fdopen(os.dup(descriptor), "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:  # it grows while it is read
        raise DataFormatError(f"{path} has more than {max_bytes:,} bytes; {NOT_OURS}")
    return content, status


def open_plain_file(path: Path) -> int:
    """A descriptor to read from; never waits. Raises as ``read_json`` does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW)
    except FileNotFoundError:
        raise
    except OSError as error:
        kind = _kind_name(path)
        if kind is not None:
            raise _not_plain(path, kind) from error
        raise StorageError(f"cannot read {path}: {error}") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise _not_plain(path, kind_name(mode))


def parse_json(content: bytes, source: str, limits: Limits = RECORD) -> Json:
    """The value of JSON text with finite numbers and whole characters.

    Raises DataFormatError; ``source`` is what it calls the text.
    """
    try:
        value: Json = json.loads(
            content,
            parse_constant=_refused_constant,
            parse_float=_finite_float,
            parse_int=partial(_small_integer, limits.max_digits),
        )
        _require_limits(value, limits.max_depth)
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"{source} is not JSON ({error}); {NOT_OURS}") from error
    return value


def required_fields(value: Json, source: Path | str, kinds: Kinds) -> dict[str, Any]:
    """The object, once each named field is there and of one of its kinds; others are left alone.

    ``float`` takes whole numbers, too; ``bool`` is no number. ``type(None)`` may also be missing.

    Raises DataFormatError that names the file and the field.
    """
    if not isinstance(value, dict):
        raise DataFormatError(f"{source} holds {_described(value)}, expected an object; {NOT_OURS}")
    for name, allowed in kinds.items():
        if name not in value and type(None) not in allowed:
            raise DataFormatError(f"{source} has no {name}; {NOT_OURS}")
        if not is_kind(value.get(name), allowed):
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in allowed)
            raise DataFormatError(
                f"{source}: {name} is {_described(value.get(name))}, expected {expected}; "
                f"{NOT_OURS}"
            )
    return value


@contextmanager
def shape_expected(source: Path | str) -> Iterator[None]:
    """For code that takes apart what was read: where that does not fit, the file is at fault.

    Raises DataFormatError that names the file.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, HoldfastError):
            raise
        raise DataFormatError(
            f"{source} does not hold what Holdfast writes there ({error!r:.200}); {NOT_OURS}"
        ) from error


def is_kind(value: object, allowed: tuple[type, ...]) -> bool:
    """Whether a value that was read from JSON is of one of these types."""
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return int in allowed or float in allowed
    return isinstance(value, allowed)


def kind_name(mode: int) -> str:
    """What a file that is no plain one is, in words."""
    return KIND_NAMES.get(stat.S_IFMT(mode), f"of mode {mode:o}")


def _kind_name(path: Path) -> str | None:
    """What stands there, where it is no plain file; None where it is one, or cannot be seen."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    return None if stat.S_ISREG(mode) else kind_name(mode)


def _not_plain(path: Path, kind: str) -> DataFormatError:
    return DataFormatError(
        f"{path} should be a plain file and is {kind}; it was not made by Holdfast: move it away"
    )


def _refused_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _small_integer(max_digits: int, text: str) -> int:
    if len(text) > max_digits:
        raise ValueError(f"a number has {len(text)} digits, at most {max_digits} are read")
    return int(text)


def _require_limits(value: Json, max_depth: int) -> None:
    """Raise ValueError for what nests too deep, and for half a character."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > max_depth + 1:
            raise ValueError(f"it nests more than {max_depth} deep")
        inner: list[Json] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
                inner.extend(item)
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, str) and not item.isascii():
                item.encode()  # UnicodeEncodeError is a ValueError
        level = inner


def _described(value: object) -> str:
    if value is None or isinstance(value, (bool, int, float)):
        return f"{value!r:.40}"
    if isinstance(value, str):
        return f"{value!r:.60}"
    return kind_of(value)
