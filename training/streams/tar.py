"""Where the samples of a tar lie: its headers, read without unpacking anything.

POSIX.1-2001 (ustar and pax) and GNU's long names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from holdfast.training.errors import DataFormatError

BLOCK = 512
FILES = (b"0", b"\0", b"7")
LONG_NAME, PAX = b"L", b"x"
MAX_NAME_BYTES = 1 << 20


class TarError(ValueError):
    """What is wrong with a tar, and at which byte."""


@dataclass(frozen=True)
class Member:
    """A plain file of a tar: its name, where its headers begin, and where its bytes lie."""

    name: str
    begin: int
    first: int
    size_bytes: int

    @property
    def key(self) -> str:
        """The name up to the first dot of its last part: that of the sample."""
        folder, _, file = self.name.rpartition("/")
        stem = file.partition(".")[0]
        return f"{folder}/{stem}" if folder else stem

    @property
    def suffix(self) -> str:
        """What comes after that dot."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def tar_places(path: Path) -> list[tuple[int, int]]:
    """Begin and end of each sample: of consecutive members with one key.

    Raises DataFormatError where the tar is damaged, or ends without the blocks that close it.
    """
    found: list[tuple[int, int]] = []
    key = None
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        try:
            for member in members(stream, size_bytes, is_whole=True):
                end = member.first + _padded(member.size_bytes)
                if member.key == key:
                    found[-1] = (found[-1][0], end)
                else:
                    found.append((member.begin, end))
                key = member.key
        except TarError as error:
            raise DataFormatError(f"{path}: {error}") from error
    return found


def members(stream: BinaryIO, size_bytes: int, is_whole: bool = False) -> Iterator[Member]:
    """The plain files of a tar, or of a piece of one. Raises TarError where it is damaged.

    ``is_whole`` says that it must end as a tar does.
    """
    place = begin = 0
    long_name = ""
    while place < size_bytes:
        stream.seek(place)
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            raise TarError(f"it is truncated: the header at byte {place} is not whole")
        if not header.strip(b"\0"):
            return
        kind, size = _checked(header, place)
        first = place + BLOCK
        place = first + _padded(size)
        if first + size > size_bytes:
            raise TarError(
                f"it is truncated: the member at byte {begin} ends at byte {first + size}, and "
                f"there are {size_bytes}"
            )
        if kind in (LONG_NAME, PAX):
            long_name = _long_name(kind, stream.read(min(size, MAX_NAME_BYTES))) or long_name
            continue
        if kind in FILES:
            yield Member(long_name or _name(header), begin, first, size)
        begin, long_name = place, ""
    if is_whole:
        raise TarError(f"it is truncated: it ends at byte {size_bytes} without being closed")


def _checked(header: bytes, place: int) -> tuple[bytes, int]:
    """Kind and size of a member. Raises TarError where the header's sum is wrong."""
    told = header[148:156].strip(b"\0 ")
    total = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    if not told or not told.isdigit() or int(told, 8) != total:
        raise TarError(f"it is damaged: there is no header at byte {place}")
    field = header[124:136]
    if field[0] & 0x80:  # GNU's base 256, for more than 8 GiB
        return header[156:157], int.from_bytes(field[1:], "big")
    return header[156:157], int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:262] == b"ustar" else b""
    is_posix = header[257:265] == b"ustar\x0000"
    return (prefix + b"/" + name if prefix and is_posix else name).decode(errors="surrogateescape")


def _long_name(kind: bytes, content: bytes) -> str:
    """The name that an extra header gives; empty where it says something else."""
    if kind == LONG_NAME:
        return content.rstrip(b"\0").decode(errors="surrogateescape")
    while content:
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            return ""
        record = rest[: int(length) - len(length) - 2]
        if record.startswith(b"path="):
            return record[5:].decode(errors="surrogateescape")
        content = content[int(length) :]
    return ""


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
