"""Small stream files of every kind, with numbered samples."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


def write_tar(path: Path, numbers: Sequence[int], form: int = tarfile.PAX_FORMAT) -> None:
    """Each third sample has a name that does not fit into a header."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for number in numbers:
            folder = f"{'long/' * 40}" if number % 3 == 0 and form != tarfile.USTAR_FORMAT else ""
            for suffix, content in (("txt", f"text {number}"), ("cls", str(number))):
                member = tarfile.TarInfo(f"{folder}{number:06d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content.encode()))


def write_lines(path: Path, numbers: Sequence[int]) -> None:
    """With blank lines between, and no end of the last line."""
    lines = [json.dumps({"number": number, "text": f"téxt {number}"}) for number in numbers]
    path.write_text("\n\n".join(lines), encoding="utf-8")


def write_mds(path: Path, numbers: Sequence[int]) -> None:
    """As MosaicML's streaming 0.13 writes a shard, without compression."""
    config = {
        "column_encodings": ["int64", "str"],
        "column_names": ["number", "text"],
        "column_sizes": [8, None],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": None,
        "version": 2,
    }
    header = json.dumps(config, sort_keys=True).encode()
    samples = []
    for number in numbers:
        text = f"text {number}".encode()
        samples.append(np.uint32(len(text)).tobytes() + np.int64(number).tobytes() + text)
    first = 4 + 4 * (len(samples) + 1) + len(header)
    ends = np.cumsum([first, *map(len, samples)]).astype("<u4")
    content = np.uint32(len(samples)).tobytes() + ends.tobytes() + header
    path.write_bytes(content + b"".join(samples))


def write_parquet(path: Path, numbers: Sequence[int]) -> None:
    """Three rows a row group."""
    import pyarrow as arrow
    from pyarrow import parquet

    table = arrow.table({"number": list(numbers), "text": [f"text {n}" for n in numbers]})
    parquet.write_table(table, path, row_group_size=3)


WRITERS: dict[str, Callable[[Path, Sequence[int]], None]] = {
    ".tar": write_tar,
    ".jsonl": write_lines,
    ".mds": write_mds,
    ".parquet": write_parquet,
}


def number_of(sample: dict[str, object]) -> int:
    """The number of a sample of any of them."""
    return int(sample.get("number", sample.get("cls")))  # type: ignore[call-overload, no-any-return]


def write_folder(folder: Path, suffix: str, sizes: Sequence[int] = (5, 1, 8, 4)) -> int:
    """Files of so many samples each, numbered through; the number of all."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, size in enumerate(sizes):
        WRITERS[suffix](folder / f"part-{number}{suffix}", range(first, first + size))
        first += size
    return first
