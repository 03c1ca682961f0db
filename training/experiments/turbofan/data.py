"""Read NASA's C-MAPSS files and cut them into windows.

A file holds one row a cycle: engine, cycle, 3 settings, 21 sensors; blank separated, no header;
engines and their cycles are numbered from 1 without gaps.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holdfast.training.errors import DataFormatError, DataNotFoundError

logger = logging.getLogger(__name__)

NUM_COLUMNS = 26
SENSORS = (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)
"""The sensors, counted from 1, that vary within every operating condition."""
FEATURE_COLUMNS = (2, 3, 4, *(4 + sensor for sensor in SENSORS))
NASAS_OFFER = (
    "NASA offers them as CMAPSSData.zip (Turbofan Engine Degradation Simulation) at "
    "https://www.nasa.gov/intelligent-systems-division/discovery-and-systems-health/pcoe/"
    "pcoe-data-set-repository/; unpack it and name the folder with --set data.folder=PATH. "
    "To try without: python -m holdfast.training.experiments.turbofan.synthetic PATH"
)
GIVEN_OFFER = (
    "experiment.validation_file, experiment.test_file and their rul_file name files in data.folder"
)

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Engines:
    """The histories of some engines, one after another.

    Attributes:
        ids: number of each engine, [E].
        starts: first row of each engine, [E].
        lengths: cycles of each engine, [E].
        rows: features of each cycle, [N, F]: settings, sensors, and the age where it is asked for.
        final_rul: cycles that each engine still ran after its last row, [E].
    """

    ids: Integers
    starts: Integers
    lengths: Integers
    rows: Floats
    final_rul: Floats

    def chosen(self, is_chosen: npt.NDArray[np.bool_]) -> Engines:
        """The engines for which the mask [E] holds."""
        lengths = self.lengths[is_chosen]
        return Engines(
            ids=self.ids[is_chosen],
            starts=np.cumsum(lengths) - lengths,
            lengths=lengths,
            rows=self.rows[np.repeat(is_chosen, self.lengths)],
            final_rul=self.final_rul[is_chosen],
        )

    def with_age(self) -> Engines:
        """The same with each cycle's number, from 1, as the last feature."""
        first = np.repeat(self.starts, self.lengths)
        age = np.arange(len(self.rows)) - first + 1.0
        return replace(self, rows=np.column_stack((self.rows, age)))

    def histories(self) -> list[Floats]:
        """Rows of each engine."""
        return np.split(self.rows, self.starts[1:])

    def fingerprint(self) -> str:
        """Digest of the histories."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.lengths, self.rows, self.final_rul):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def read_training_engines(
    folder: Path | None, subset: str, *, should_have_test: bool = True
) -> Engines:
    """Engines that ran until they failed. Opens ``train_<subset>.txt`` alone.

    Raises:
        DataNotFoundError: no folder is named, or the file is not in it; or, with
            ``should_have_test``, one of the subset's other two files is not.
        DataFormatError: the file is not of the format; names the line.
    """
    name = f"train_{subset}.txt"
    names = _names(subset) if should_have_test else (name,)
    return _read_cycles(_locate(folder, names, name))


def read_test_engines(folder: Path | None, subset: str) -> Engines:
    """Engines that were stopped some time before they failed, and how long they had still to run.

    Raises:
        DataNotFoundError: no folder is named, or one of the subset's files is not in it.
        DataFormatError: a file is not of the format; names the line.
    """
    _, name, rul_name = names = _names(subset)
    return _read_stopped(_locate(folder, names, name), _locate(folder, names, rul_name))


def read_given_engines(folder: Path | None, name: str, rul_name: str | None) -> Engines:
    """Engines of a file that somebody else fixed, and what they had still to run.

    Without ``rul_name`` they ran until they failed. Raises as ``read_test_engines``.
    """
    names = (name,) if rul_name is None else (name, rul_name)
    paths = [_locate(folder, names, one, GIVEN_OFFER) for one in names]
    return _read_stopped(*paths) if len(paths) > 1 else _read_cycles(paths[0])


def without_given(engines: Engines, given: Sequence[Engines]) -> Engines:
    """The engines that none of the given ones is, to train on; a warning counts what is left out.

    Raises DataFormatError where no engine is left.
    """
    is_given = are_among(engines, given)
    if is_given.all():
        raise DataFormatError(
            f"all {len(is_given)} engines to train on are in the given validation or test file, "
            "too; take another experiment.validation_file or experiment.test_file"
        )
    if is_given.any():
        logger.warning(
            "of %d engines to train on, %d are left out: a given validation or test file has them",
            len(is_given),
            is_given.sum(),
        )
    return engines.chosen(~is_given)


def warn_of_shared(validation: Engines, given_test: Engines) -> None:
    """Tell how many validation engines are tested as well; they stay in both."""
    num_shared = int(are_among(validation, [given_test]).sum())
    if num_shared:
        logger.warning(
            "%d of %d validation engines are in the given test file, too, and stay in both: the "
            "champion is chosen on engines that test it",
            num_shared,
            len(validation.ids),
        )


def are_among(engines: Engines, others: Sequence[Engines]) -> npt.NDArray[np.bool_]:
    """Which engines [E] are in one of the others, too.

    Two histories are of one engine where all cycles that both have are equal to the last digit: one
    may have been stopped earlier.
    """
    histories: dict[bytes, list[Floats]] = defaultdict(list)
    for history in (one for other in others for one in other.histories()):
        histories[history[0].tobytes()].append(history)
    return np.array(
        [
            any(_is_one_engine(own, other) for other in histories.get(own[0].tobytes(), ()))
            for own in engines.histories()
        ]
    )


def _is_one_engine(one: Floats, other: Floats) -> bool:
    num_common = min(len(one), len(other))
    return np.array_equal(one[:num_common], other[:num_common])


def _read_stopped(cycles_path: Path, path: Path) -> Engines:
    engines = _read_cycles(cycles_path)
    table, line_numbers = _read_table(path, num_columns=1)
    if len(table) != len(engines.ids):
        raise DataFormatError(
            f"{path}: expected one line for each of the {len(engines.ids)} engines of "
            f"{cycles_path.name}, found {len(table)}; take both files from one archive"
        )
    if (table < 0).any():
        row = int((table[:, 0] < 0).argmax())
        raise DataFormatError(
            f"{path}, line {line_numbers[row]}: expected remaining cycles of at least 0, "
            f"found {table[row, 0]:g}"
        )
    return replace(engines, final_rul=table[:, 0])


def window_rows(engines: Engines, engine: Integers, cycles: Integers, window: int) -> Integers:
    """Rows [B, window] of the windows that end with the given cycle (from 1) of an engine [B].

    Where the engine has fewer cycles before it, its first row is repeated.
    """
    start = engines.starts[engine]
    last = start + cycles - 1
    rows: Integers = np.maximum(last[:, None] + np.arange(1 - window, 1), start[:, None])
    return rows


def _names(subset: str) -> tuple[str, str, str]:
    return f"train_{subset}.txt", f"test_{subset}.txt", f"RUL_{subset}.txt"


def _locate(folder: Path | None, names: Sequence[str], name: str, offer: str = NASAS_OFFER) -> Path:
    """The file of this name. That all of them are there is asked before a training, not after."""
    expected = " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else name
    if folder is None:
        raise DataNotFoundError(f"turbofan needs a folder with {expected}; none is named. {offer}")
    missing = [one for one in names if not (folder / one).is_file()]
    if missing:
        state = "does not have it" if folder.is_dir() else "does not exist"
        raise DataNotFoundError(
            f"turbofan needs {expected}; {missing[0]} is missing: the folder {folder} {state}. "
            f"{offer}"
        )
    return folder / name


def _read_cycles(path: Path) -> Engines:
    table, line_numbers = _read_table(path, NUM_COLUMNS)
    unit, cycle = table[:, 0], table[:, 1]
    is_new = np.append(True, unit[1:] != unit[:-1])
    starts = np.flatnonzero(is_new)
    lengths = np.diff(np.append(starts, len(table)))
    expected_unit = np.repeat(np.arange(1, len(starts) + 1), lengths)
    expected_cycle = np.arange(len(table)) - np.repeat(starts, lengths) + 1
    is_wrong = (unit != expected_unit) | (cycle != expected_cycle)
    if is_wrong.any():
        row = int(is_wrong.argmax())
        raise DataFormatError(
            f"{path}, line {line_numbers[row]}: expected engine {expected_unit[row]}, cycle "
            f"{expected_cycle[row]} (both are counted from 1 without gaps), found engine "
            f"{unit[row]:g}, cycle {cycle[row]:g}"
        )
    return Engines(
        ids=unit[starts].astype(np.int64),
        starts=starts.astype(np.int64),
        lengths=lengths.astype(np.int64),
        rows=np.ascontiguousarray(table[:, FEATURE_COLUMNS]),
        final_rul=np.zeros(len(starts)),
    )


def _read_table(path: Path, num_columns: int) -> tuple[Floats, list[int]]:
    """Numbers [N, num_columns] and the line each row stands on. Blank lines are skipped."""
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    line_numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    if not line_numbers:
        raise DataFormatError(f"{path}: expected rows of {num_columns} numbers, found none")
    try:
        table: Floats = np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2)
    except ValueError:
        table = np.empty((0, 0))
    if table.shape[1] != num_columns or not np.isfinite(table).all():
        raise DataFormatError(f"{path}, {_first_flaw(lines, num_columns)}")
    return table, line_numbers


def _first_flaw(lines: list[str], num_columns: int) -> str:
    for number, line in enumerate(lines, start=1):
        values = line.split()
        if values and len(values) != num_columns:
            return f"line {number}: expected {num_columns} numbers, found {len(values)} values"
        for column, value in enumerate(values, start=1):
            if not _is_finite_number(value):
                return f"line {number}, column {column}: expected a number, found {value[:40]!r}"
    raise AssertionError("a table without flaws was refused")


def _is_finite_number(value: str) -> bool:
    try:
        return "_" not in value and bool(np.isfinite(float(value)))
    except ValueError:
        return False
