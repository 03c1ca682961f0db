"""The kinds of stream files: where their samples lie, and what a sample is.

A kind says, for a file, a pair of numbers for each sample, [N, 2]; and, from such a pair, the
sample as a dict of its fields. To add one, write a class and a row in ``KINDS``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from holdfast.training.data.permutation import Int64Array
from holdfast.training.errors import DataFormatError
from holdfast.training.streams.tar import members, tar_places

Sample = dict[str, Any]


class OpenFile(Protocol):
    """A stream file that samples are read from."""

    def read(self, first: int, second: int) -> Any:
        """What lies at the place of a sample, as it is in the file."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class Kind(Protocol):
    """One kind of stream files."""

    def places(self, path: Path) -> Int64Array:
        """The places of all samples, [N, 2]. Raises DataFormatError where the file is damaged."""
        ...

    def open(self, path: Path) -> OpenFile:
        """The file, to read samples from. Raises OSError."""
        ...

    def sample(self, raw: Any) -> Sample:
        """The fields of a sample. May raise anything where it is damaged."""
        ...


class BytesFile:
    """A file whose samples are consecutive bytes: a place is where they begin and end."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, first: int, second: int) -> bytes:
        """The bytes. Raises OSError, EOFError where the file ends before."""
        content = os.pread(self._descriptor, second - first, first)
        while len(content) < second - first:
            more = os.pread(self._descriptor, second - first - len(content), first + len(content))
            if not more:
                raise EOFError(f"the file ends at byte {first + len(content)}")
            content += more
        return content

    def close(self) -> None:
        """Close it; also done where nobody has it any more."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


class JsonLines:
    """A value of JSON in each line; blank lines are none."""

    def places(self, path: Path) -> Int64Array:
        """Begin and end of each line."""
        found, end = [], 0
        with path.open("rb") as stream:
            for line in stream:
                first, end = end, end + len(line)
                if line.strip():
                    found.append((first, end))
        return as_places(found)

    def open(self, path: Path) -> OpenFile:
        """The file."""
        return BytesFile(path)

    def sample(self, raw: Any) -> Sample:
        """The fields of the object; of another value, its one field ``value``."""
        found = json.loads(raw)
        return found if isinstance(found, dict) else {"value": found}


class Tar:
    """A tar as WebDataset writes it: consecutive members of one name, with suffixes, are a sample.

    Its fields are the suffixes, with the bytes of the member; ``__key__`` is the name.
    """

    def places(self, path: Path) -> Int64Array:
        """Begin and end of the members of each sample."""
        return as_places(tar_places(path))

    def open(self, path: Path) -> OpenFile:
        """The file."""
        return BytesFile(path)

    def sample(self, raw: Any) -> Sample:
        """``__key__``, and the bytes by suffix."""
        found: Sample = {}
        for member in members(BytesIO(raw), len(raw)):
            found["__key__"] = member.key
            found[member.suffix] = raw[member.first : member.first + member.size_bytes]
        return found


class Mds:
    """A shard as MosaicML's streaming writes it, not compressed; ``index.json`` is not needed.

    The header of each shard says how its columns are encoded. Columns of pickles are refused.
    """

    def places(self, path: Path) -> Int64Array:
        """Begin and end of each sample."""
        size_bytes = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(4)
            num = int.from_bytes(head, "little")
            content = stream.read(4 * (num + 1))
        if len(head) < 4 or len(content) < 4 * (num + 1):
            raise DataFormatError(f"{path} is truncated: its header ends too soon")
        ends = np.frombuffer(content, dtype="<u4").astype(np.int64)
        if (np.diff(ends) < 0).any() or ends[0] < 4 + len(content) or ends[-1] > size_bytes:
            raise DataFormatError(
                f"{path} is truncated or no MDS shard: its {num} samples should end at byte "
                f"{ends[-1]}, and it has {size_bytes} bytes"
            )
        return np.stack((ends[:-1], ends[1:]), axis=1)

    def open(self, path: Path) -> OpenFile:
        """The file."""
        return MdsFile(path)

    def sample(self, raw: Any) -> Sample:
        """The columns, decoded."""
        content, columns = raw
        sizes, place = [], 0
        for _, _, size in columns:
            if size is None:
                sizes.append(int.from_bytes(content[place : place + 4], "little"))
                place += 4
            else:
                sizes.append(size)
        found: Sample = {}
        for (name, encoding, _), size in zip(columns, sizes, strict=True):
            part = content[place : place + size]
            if len(part) < size:
                raise ValueError(f"column {name} should have {size} bytes and has {len(part)}")
            found[name] = MDS_ENCODINGS[encoding](part)
            place += size
        return found


class MdsFile(BytesFile):
    """An MDS shard: a sample is its bytes, and how the columns are encoded."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        num = int.from_bytes(self.read(0, 4), "little")
        begin = 4 + 4 * (num + 1)
        first = int.from_bytes(self.read(4, 8), "little")
        config = json.loads(self.read(begin, first))
        names, encodings = config["column_names"], config["column_encodings"]
        unknown = [one for one in encodings if one not in MDS_ENCODINGS]
        if unknown:
            self.close()
            raise DataFormatError(
                f"{path} has a column of encoding {unknown[0]!r}; those that are read are "
                f"{', '.join(MDS_ENCODINGS)}"
            )
        self._columns = list(zip(names, encodings, config["column_sizes"], strict=True))

    def read(self, first: int, second: int) -> Any:
        """Bytes and columns; bytes alone while the header is read."""
        content = super().read(first, second)
        columns = getattr(self, "_columns", None)
        return content if columns is None else (content, columns)


class Parquet:
    """Rows of Parquet, read by pyarrow, a row group at a time; needs ``holdfast[parquet]``."""

    def places(self, path: Path) -> Int64Array:
        """Row group, and number in it, of each row."""
        with _parquet_errors(path):
            told = _pyarrow_parquet().read_metadata(path)
        nums = [told.row_group(number).num_rows for number in range(told.num_row_groups)]
        return as_places([(group, row) for group, num in enumerate(nums) for row in range(num)])

    def open(self, path: Path) -> OpenFile:
        """The file."""
        return ParquetFile(path)

    def sample(self, raw: Any) -> Sample:
        """The columns of the row."""
        (row,) = raw.to_pylist()
        return dict(row)


class ParquetFile:
    """A Parquet file, with the row groups that were read last in memory."""

    NUM_GROUPS_HELD = 8

    def __init__(self, path: Path) -> None:
        with _parquet_errors(path):
            self._file = _pyarrow_parquet().ParquetFile(path, memory_map=True)
        self._groups: dict[int, Any] = {}

    def read(self, first: int, second: int) -> Any:
        """A table of one row."""
        group = self._groups.pop(first, None)
        if group is None:
            group = self._file.read_row_group(first, use_threads=False)
        self._groups[first] = group
        while len(self._groups) > self.NUM_GROUPS_HELD:
            del self._groups[next(iter(self._groups))]
        return group.slice(second, 1)

    def close(self) -> None:
        """Close it."""
        self._groups.clear()
        self._file.close()


def as_places(found: list[tuple[int, int]]) -> Int64Array:
    """Places as numbers, [N, 2]."""
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _number(dtype: str) -> Callable[[bytes], Any]:
    return lambda content: np.frombuffer(content, dtype=dtype)[0]


INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
NUMBERS = (*INTEGERS, "float16", "float32", "float64")
MDS_ENCODINGS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "str": bytes.decode,
    "int": lambda content: int.from_bytes(content, "little", signed=True),
    "json": json.loads,
    "jpeg": bytes,
    "png": bytes,
    **{name: _number(name) for name in NUMBERS},
}
KINDS: dict[str, Kind] = {
    ".tar": Tar(),
    ".jsonl": JsonLines(),
    ".ndjson": JsonLines(),
    ".mds": Mds(),
    ".parquet": Parquet(),
}
"""By the end of a file's name."""


def kind_of(name: str) -> Kind | None:
    """The kind of a file; None where its name is of none."""
    return KINDS.get(Path(name).suffix.lower())


def _pyarrow_parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise DataFormatError(
            f"Parquet is read by {error.name}, which is not installed: pip install "
            f"'holdfast[parquet]'"
        ) from None


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """pyarrow's errors about a file as ours."""
    try:
        yield
    except (DataFormatError, FileNotFoundError):
        raise
    except (ValueError, OSError) as error:  # its ArrowInvalid is a ValueError
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataFormatError(f"{path} is truncated or no Parquet file: {told}") from error
