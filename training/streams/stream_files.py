"""Stream files as a data set: samples by number, and an order that opens few files at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from holdfast.training.data.permutation import Int64Array
from holdfast.training.errors import DataFormatError, DataNotFoundError, HoldfastError
from holdfast.training.experiment.error_places import described
from holdfast.training.experiment.protocol import collate
from holdfast.training.storage.address import address_in
from holdfast.training.streams.bucket_source import BucketSource
from holdfast.training.streams.formats import OpenFile, Sample, kind_of
from holdfast.training.streams.index import Index, local_index, stream_names
from holdfast.training.streams.order import WindowedOrder

WINDOW = 4096
MAX_OPEN_FILES = 64
CACHE_BYTES = 32 * 2**30


class StreamFiles:
    """The samples of stream files, as items of a data set.

    An epoch visits the files in an order of its own, and shuffles ``window`` samples that follow
    one another at a time: a function of (seed, epoch, position), at the same cost at any position.
    A subclass, or ``decode``, says what an item is; random draws in it are seeded by the place.

    Args:
        place: a stream file, a folder of them, or an address, ``s3://bucket/prefix``.
        decode: from a sample's fields to an item; a function at the top of a module where there
            are loader processes.
        window: samples that are shuffled together: larger mixes better and opens more files.
        cache_bytes: of an address, how much of it may lie on this machine's scratch disk.

    Raises InputError, in one line, where the files or their index are not as they should be.
    """

    def __init__(
        self,
        place: Path | str,
        decode: Callable[[Sample], Any] | None = None,
        *,
        window: int = WINDOW,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if window < 1:
            raise DataFormatError(f"window = {window} holds no sample; take at least 1")
        self._decode = decode
        self._window = window
        self._source: Source = _source(place, cache_bytes)
        self.index = self._source.index
        self.fingerprint = self.index.fingerprint
        self._ends = np.cumsum(self.index.counts)
        self._kinds = [kind_of(file.name) for file in self.index.files]
        self._open: OrderedDict[int, OpenFile] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Any:
        raw, file = self._raw(int(number))
        return self._item(raw, file, int(number))

    def permutation_by_key(self, key: int) -> WindowedOrder:
        """The order of an epoch."""
        return WindowedOrder(self.index.counts, key, self._window)

    def fetch(self, numbers: Sequence[int]) -> Any:
        """A batch. Files are read in their order, and items are decoded in that of the batch."""
        wanted = np.asarray(numbers, dtype=np.int64)
        raws: list[Any] = [None] * len(wanted)
        for place in np.argsort(wanted, kind="stable").tolist():
            raws[place] = self._raw(int(wanted[place]))
        items = [
            self._item(raw, file, int(number))
            for (raw, file), number in zip(raws, wanted, strict=True)
        ]
        return collate(self, items)

    def item(self, sample: Sample) -> Any:
        """The item that a sample is: what ``decode`` makes of it, or its fields as they are."""
        return sample if self._decode is None else self._decode(sample)

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a loader process: no open file, and no index of samples."""
        state = {name: value for name, value in self.__dict__.items() if name != "_places"}
        return {**state, "_open": OrderedDict()}

    @cached_property
    def _places(self) -> Int64Array:
        return self.index.places()

    def _raw(self, number: int) -> tuple[Any, int]:
        """What lies at a sample's place, and the number of its file."""
        if not 0 <= number < len(self):
            raise IndexError(f"samples are numbered 0 to {len(self) - 1}, found {number}")
        file = int(np.searchsorted(self._ends, number, side="right"))
        first, second = self._places[number].tolist()
        try:
            return self._opened(file).read(first, second), file
        except HoldfastError:
            raise
        except FileNotFoundError:
            raise DataNotFoundError(
                f"{self._named(file)} is missing; it was there when training began"
            ) from None
        except (OSError, EOFError, ValueError) as error:
            raise DataFormatError(
                f"{self._told(file, number)} cannot be read: {described(error)}; the file was "
                f"changed or truncated since its index was made"
            ) from error

    def _item(self, raw: Any, file: int, number: int) -> Any:
        kind = self._kinds[file]
        assert kind is not None
        try:
            return self.item(kind.sample(raw))
        except HoldfastError:
            raise
        except Exception as error:
            raise DataFormatError(
                f"{self._told(file, number)} cannot be decoded: {described(error)}"
            ) from error

    def _opened(self, number: int) -> OpenFile:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        found = self._open[number] = self._source.open(number)
        while len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return found

    def _named(self, file: int) -> str:
        return self._source.named(file)

    def _told(self, file: int, number: int) -> str:
        """A sample by its file and its place in it."""
        first = int(self._ends[file]) - self.index.files[file].num_samples
        place = ", ".join(map(str, self._places[number].tolist()))
        return f"sample {number - first} of {self._named(file)} (place {place})"


class Source(Protocol):
    """Where stream files come from."""

    index: Index

    def open(self, number: int) -> OpenFile:
        """A file, to read samples from. Raises OSError, or one of ours."""
        ...

    def named(self, number: int) -> str:
        """How a file is called."""
        ...


class LocalSource:
    """Stream files of this machine."""

    def __init__(self, place: Path) -> None:
        self._root, _ = stream_names(place)
        self.index: Index = local_index(place)

    def open(self, number: int) -> OpenFile:
        """A file."""
        file = self.index.files[number]
        kind = kind_of(file.name)
        assert kind is not None
        return kind.open(self._root / file.name)

    def named(self, number: int) -> str:
        """How a file is called."""
        return str(self._root / self.index.files[number].name)


def _source(place: Path | str, cache_bytes: int) -> Source:
    address = address_in(place)
    return LocalSource(Path(place)) if address is None else BucketSource(address, cache_bytes)
