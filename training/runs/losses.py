"""The bits of each step's loss, so that every step which is done twice proves something.

Each segment keeps a file of its own, ``losses/<segment>-<first step>.f64``: the losses of
consecutive steps as little-endian fp64, 8 bytes a step. A step that a later segment does again must
have the same bits. What a killed process had not written yet counts as not compared.
"""

from __future__ import annotations

import re
import stat
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.training.runs.directory import SegmentRecord, read_run_record
from holdfast.training.runs.paths import RunDirectory

BYTES_PER_STEP = 8
FILE_NAME = re.compile(r"([0-9]{4,9})-([0-9]{8,15})\.f64")


@dataclass(frozen=True)
class LossFile:
    """The losses that one segment has written so far.

    Attributes:
        segment: its number.
        first_step: the step of the first loss, at least 1.
        num_steps: how many losses are there in full.
    """

    path: Path
    segment: int
    first_step: int
    num_steps: int

    @property
    def end_step(self) -> int:
        """The last step whose loss is there."""
        return self.first_step + self.num_steps - 1

    def read(self, first_step: int) -> array[int]:
        """The bits from a step on, which may lie before or after what is there."""
        skipped = max(0, first_step - self.first_step)
        with self.path.open("rb") as file:
            file.seek(skipped * BYTES_PER_STEP)
            content = file.read(max(0, self.num_steps - skipped) * BYTES_PER_STEP)
        bits = array("Q", content[: len(content) // BYTES_PER_STEP * BYTES_PER_STEP])
        if sys.byteorder == "big":
            bits.byteswap()
        return bits


@dataclass(frozen=True)
class Difference:
    """A step that was done twice, with two losses."""

    step: int
    segment: int
    earlier_loss: float
    loss: float

    def __str__(self) -> str:
        return (
            f"step {self.step} was done again in segment {self.segment} and had the loss "
            f"{self.loss!r}, where it had {self.earlier_loss!r} before"
        )


class KnownLosses:
    """Bits that earlier segments have left for the steps after a step."""

    def __init__(self, files: Sequence[LossFile], after_step: int) -> None:
        """``files`` in the order of their segments: of a step done often, the last one counts."""
        self._bits: dict[int, int] = {}
        for file in files:
            if file.end_step > after_step:
                first = max(file.first_step, after_step + 1)
                self._bits.update(enumerate(file.read(first), first))

    def __len__(self) -> int:
        return len(self._bits)

    def compare(self, step: int, bits: int, segment: int) -> Difference | None:
        """How a loss differs from what was there. Call only where ``knows`` the step."""
        before = self._bits[step]
        return None if before == bits else Difference(step, segment, loss_of(before), loss_of(bits))

    def knows(self, step: int) -> bool:
        """Whether an earlier loss of this step was kept."""
        return step in self._bits


@dataclass(frozen=True)
class ComparedLosses:
    """What the losses of a run prove.

    Attributes:
        num_compared: losses of steps that were done again, held against earlier ones.
        differences: those that were not the same, the first ten.
        num_different: how many were not.
    """

    num_compared: int = 0
    num_different: int = 0
    differences: tuple[Difference, ...] = ()

    def as_json(self) -> dict[str, int]:
        """The two counts, for programs and for a bundle's manifest."""
        return {"num_compared": self.num_compared, "num_different": self.num_different}

    def told(self, num_repeated: int) -> str:
        """One line; ``num_repeated`` steps were done again, as the ledger has it."""
        if not num_repeated:
            return "no step was done twice"
        steps = "1 step was" if num_repeated == 1 else f"{num_repeated:,} steps were"
        words = f"{steps} done twice, {self.num_compared:,} compared"
        if not self.num_compared:
            return words
        if not self.num_different:
            return f"{words}, all with the same bits"
        return f"{words}, {self.num_different:,} differently: {self.differences[0]}"


def compare_losses(run: RunDirectory) -> ComparedLosses:
    """Hold every loss of a step that was done again against the one before it.

    Not against one that a segment with another configuration computed.
    """
    num_compared = 0
    differences: list[Difference] = []
    files = loss_files(run)
    first_comparable = _first_comparable(run)
    for number, file in enumerate(files):
        first = first_comparable(file.segment)
        before = [one for one in files[:number] if one.segment >= first]
        known = KnownLosses(before, file.first_step - 1)
        if not len(known):
            continue
        for step, bits in enumerate(file.read(file.first_step), file.first_step):
            if known.knows(step):
                num_compared += 1
                found = known.compare(step, bits, file.segment)
                differences += [] if found is None else [found]
    return ComparedLosses(num_compared, len(differences), tuple(differences[:10]))


def loss_files(run: RunDirectory) -> list[LossFile]:
    """What the segments of a run have written, by segment. Empty for runs from before."""
    return sorted(_files(run.losses), key=lambda file: file.segment)


def comparable_files(run: RunDirectory, segment: int) -> list[LossFile]:
    """As ``loss_files``, of segments that had the configuration which this segment has."""
    first = _first_comparable(run)(segment)
    return [file for file in loss_files(run) if file.segment >= first]


def with_known_ends(records: Sequence[SegmentRecord], run: RunDirectory) -> list[SegmentRecord]:
    """Records that know of each step whose loss was kept, also where a segment was killed.

    A segment writes its losses more often than its record: whoever counts steps that were done
    again counts by these.
    """
    return with_ends(records, loss_files(run))


def with_ends(records: Sequence[SegmentRecord], files: Iterable[LossFile]) -> list[SegmentRecord]:
    """As ``with_known_ends``, where the files are known."""
    ends = {file.segment: file.end_step for file in files if file.num_steps}
    return [
        record.model_copy(update={"end_step": max(record.end_step, ends.get(record.number, 0))})
        for record in records
    ]


def loss_path(run: RunDirectory, segment: int, first_step: int) -> Path:
    """Where a segment that does ``first_step`` first keeps its losses."""
    return run.losses / f"{segment:04d}-{first_step:08d}.f64"


def loss_of(bits: int) -> float:
    """The loss whose bits these are."""
    value: float = struct.unpack("<d", struct.pack("<Q", bits))[0]
    return value


def bits_of(loss: float) -> int:
    """The bits of a loss, as its file has them."""
    value: int = struct.unpack("<Q", struct.pack("<d", loss))[0]
    return value


def _first_comparable(run: RunDirectory) -> Callable[[int], int]:
    try:
        return read_run_record(run).first_comparable
    except FileNotFoundError:
        return lambda _: 1


def _files(folder: Path) -> Iterator[LossFile]:
    try:
        paths = [*folder.iterdir()]
    except OSError:
        return
    for path in paths:
        try:
            status = path.lstat()
        except OSError:
            continue
        file = loss_file(path, status.st_size)
        if file is not None and stat.S_ISREG(status.st_mode):  # else it is not ours to open
            yield file


def loss_file(path: Path, size_bytes: int) -> LossFile | None:
    """What a file of this name and size is; None for one that is none of ours."""
    found = FILE_NAME.fullmatch(path.name)
    if found is None:
        return None
    return LossFile(path, int(found[1]), int(found[2]), size_bytes // BYTES_PER_STEP)
