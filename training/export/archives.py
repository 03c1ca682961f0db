"""torch's zip archives without what changes from run to run or tells about this machine."""

from __future__ import annotations

import zipfile
from pathlib import Path

ALIGNMENT_BYTES = 64  # torch maps tensors straight from the file
LOCAL_HEADER_BYTES = 30
# Source paths and stack traces; a random id; example inputs that were only needed for tracing.
DROPPED = (".debug_pkl", "/.data/serialization_id")


def rewrite_reproducibly(path: Path, name: str) -> None:
    """Replace the archive by an equal one with fixed dates, names and padding.

    ``name`` becomes the archive's inner folder, which torch names after the file.
    """
    rewritten = path.with_suffix(".rewritten")
    with (
        zipfile.ZipFile(path) as old,
        rewritten.open("wb") as stream,
        zipfile.ZipFile(stream, "w") as new,
    ):
        for entry in old.infolist():
            if not entry.filename.endswith(DROPPED):
                inner = f"{name}/{entry.filename.partition('/')[2]}"
                header = zipfile.ZipInfo(inner, (1980, 1, 1, 0, 0, 0))
                header.compress_type = entry.compress_type
                header.extra = _padding(stream.tell() + LOCAL_HEADER_BYTES + len(inner))
                new.writestr(header, old.read(entry))
    rewritten.replace(path)


def _padding(position: int) -> bytes:
    size = -(position + 4) % ALIGNMENT_BYTES
    return b"FB" + size.to_bytes(2, "little") + b"Z" * size
