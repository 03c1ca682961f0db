"""What Weights & Biases has written into its files, offline: to go on where a killed process stood.

W&B has no public reader. A file begins with ``:W&B``, 0xBEE1 and a version, 7 bytes together; then
it is a log of records as LevelDB has it (https://github.com/google/leveldb, doc/log_format.md):
blocks of 32 KiB, counted from the file's beginning, with parts of records, each behind checksum,
length and kind.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.training.errors import DataFormatError

BEGINNING = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK_BYTES = 32 * 1024
PART = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def offline_steps(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Each step that the files below a folder hold, with its values by tag.

    The end of a file whose writer was killed is left out. Raises DataFormatError for another
    format than this one.
    """
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in _records(path):
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): item for item in record.history.item
                }
                values = {
                    tag: float(item.value_json)
                    for tag, item in items.items()
                    if not tag.startswith("_")
                }
                yield record.history.step.num, values


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    kind: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]  # made when it is imported
    for content in whole_records(path.read_bytes(), path):
        yield kind.FromString(content)


def whole_records(content: bytes, path: Path) -> Iterator[bytes]:
    """The records of a file, up to one that is not there in full."""
    if not content:
        return
    if not content.startswith(BEGINNING):
        raise DataFormatError(
            f"{path} begins with {content[:7]!r}, expected {BEGINNING!r}: W&B has another format "
            f"now; install the version that constraints.txt names"
        )
    place, record = len(BEGINNING), b""
    while place + PART.size <= len(content):
        left = BLOCK_BYTES - place % BLOCK_BYTES
        if left < PART.size:
            place += left
            continue
        _, length, kind = PART.unpack_from(content, place)
        part = content[place + PART.size : place + PART.size + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(part) < length:
            return
        place += PART.size + length
        record = part if kind in (FULL, FIRST) else record + part
        if kind in (FULL, LAST):
            yield record
