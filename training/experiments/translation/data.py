"""Read pairs of sentences, and split them so that no sentence is in two splits."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from holdfast.training.configuration.schema import Split
from holdfast.training.errors import DataFormatError, DataNotFoundError

Pair = tuple[str, str]


@dataclass(frozen=True)
class SplitFractions:
    """Parts of the distinct source sentences that validate and test."""

    validation: float
    test: float


@dataclass(frozen=True)
class Sentence:
    """A source sentence and all translations of it that the corpus has, in the corpus's order."""

    source: str
    translations: tuple[str, ...]


def read_tab_separated(path: Path) -> list[Pair]:
    """Pairs ``source<TAB>target``, one a line; further columns and blank lines are skipped.

    Raises:
        DataNotFoundError: there is no such file.
        DataFormatError: it is not UTF-8, or a line has no two sentences; names the line.
    """
    pairs = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        columns = [_clean(column) for column in line.split("\t")[:2]]
        if len(columns) < 2 or not all(columns):
            raise DataFormatError(
                f"{path}, line {number}: expected a sentence, a tab and its translation, found "
                f"{line[:60]!r}"
            )
        pairs.append((columns[0], columns[1]))
    return _not_empty(pairs, path)


def read_parallel(source: Path, target: Path) -> list[Pair]:
    """Line n of one file is translated by line n of the other; pairs with a blank are skipped.

    Raises:
        DataNotFoundError: there is no such file.
        DataFormatError: one is not UTF-8, or they differ in their number of lines.
    """
    lines = _lines(source), _lines(target)
    if len(lines[0]) != len(lines[1]):
        raise DataFormatError(
            f"{source} has {len(lines[0])} lines, {target} has {len(lines[1])}; line n of one must "
            "be the translation of line n of the other"
        )
    pairs = [(_clean(one), _clean(other)) for one, other in zip(*lines, strict=True)]
    return _not_empty([pair for pair in pairs if all(pair)], source)


def split_of(source: str, fractions: SplitFractions) -> Split:
    """The split of a source sentence: a function of its letters and digits alone.

    So "Go!" and "go." are together, whatever else the corpus holds, and in whatever order.
    """
    key = "".join(character for character in source.casefold() if character.isalnum()) or source
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < fractions.validation:
        return "validation"
    return "test" if place < fractions.validation + fractions.test else "train"


def sentences_of(pairs: list[Pair]) -> list[Sentence]:
    """Each distinct source sentence once, with its distinct translations."""
    grouped: dict[str, dict[str, None]] = {}
    for source, target in pairs:
        grouped.setdefault(source, {})[target] = None
    return [Sentence(source, tuple(targets)) for source, targets in grouped.items()]


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines, which also splits at characters that stand within sentences.
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataNotFoundError(
            f"translation needs {path}, which does not exist; name an existing file with "
            "experiment.pairs_file, or experiment.source_file and experiment.target_file, "
            "relative to data.folder. Without them it trains on a small generated corpus"
        ) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataFormatError(
            f"{path}, line {line}: expected UTF-8, found the byte 0x{error.object[error.start]:02x}"
        ) from error
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _not_empty(pairs: list[Pair], path: Path) -> list[Pair]:
    if not pairs:
        raise DataFormatError(f"{path}: expected pairs of sentences, found none")
    return pairs
