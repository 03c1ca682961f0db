"""Read pairs of sentences, and split them so that no training sentence is in another split."""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.training.configuration.schema import Split
from holdfast.training.errors import DataFormatError, DataNotFoundError

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Corpus:
    """All sentences, and which of them are in a split.

    Attributes:
        sentences: their place is the number by which data sets and records name them.
        numbers: of the sentences of each split, ascending.
        num_left_out: distinct source sentences that were taken out of training, because a given
            file has them, too.
    """

    sentences: tuple[Sentence, ...]
    numbers: Mapping[Split, range | list[int]]
    num_left_out: int = 0

    def fingerprint(self, numbers: Sequence[int], vocabulary: bytes) -> str:
        """Digest of a vocabulary and of some sentences with their translations."""
        digest = hashlib.blake2b(vocabulary, digest_size=16)
        for number in numbers:
            sentence = self.sentences[number]
            digest.update("\0".join((sentence.source, *sentence.translations, "")).encode())
        return digest.hexdigest()

    def note(self, test_files: Sequence[str]) -> str:
        """For the model card: that the test was given, and what training lost by it."""
        if not test_files:
            return ""
        return (
            f" Tested on {' and '.join(test_files)}, line by line; {self.num_left_out} source "
            "sentences of the validation and test files were left out of training."
        )


def hashed_corpus(pairs: list[Pair], fractions: SplitFractions) -> Corpus:
    """Each distinct source sentence once, in the split that its letters decide."""
    sentences = sentences_of(pairs)
    numbers: dict[Split, list[int]] = {"train": [], "validation": [], "test": []}
    for number, sentence in enumerate(sentences):
        numbers[split_of(sentence.source, fractions)].append(number)
    return Corpus(tuple(sentences), numbers)


def given_corpus(pairs: list[Pair], validation: list[Pair], test: list[Pair]) -> Corpus:
    """Validation and test as somebody else fixed them: line by line, each with its translation.

    Training keeps the sentences of ``pairs`` whose letters and digits are those of none of them;
    what it loses is counted, and told in a warning.

    Raises DataFormatError where nothing is left to train on.
    """
    given = {letters_of(source) for source, _ in (*validation, *test)}
    every = sentences_of(pairs)
    kept = [sentence for sentence in every if letters_of(sentence.source) not in given]
    num_left_out = len(every) - len(kept)
    if not kept:
        raise DataFormatError(
            f"all {len(every)} distinct source sentences to train on are in the files of "
            "experiment.validation_files and experiment.test_files; name other training pairs"
        )
    num_shared = len(
        {letters_of(source) for source, _ in validation} & {letters_of(s) for s, _ in test}
    )
    if num_left_out or num_shared:
        logger.warning(
            "of %d distinct source sentences to train on, %d are left out: a validation or test "
            "file has them; %d sentences are in both of these files, and stay",
            len(every),
            num_left_out,
            num_shared,
        )
    parts = kept, _one_by_one(validation), _one_by_one(test)
    ends = [sum(map(len, parts[: number + 1])) for number in range(3)]
    numbers: dict[Split, range | list[int]] = {
        "train": range(ends[0]),
        "validation": range(ends[0], ends[1]),
        "test": range(ends[1], ends[2]),
    }
    return Corpus(tuple(one for part in parts for one in part), numbers, num_left_out)


def read_files(folder: Path, names: Sequence[str]) -> list[Pair]:
    """One file of pairs, or two: source sentences and their translations. Raises as they do."""
    paths = [folder / name for name in names]
    return read_tab_separated(paths[0]) if len(paths) == 1 else read_parallel(paths[0], paths[1])


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
    digest = hashlib.blake2b(letters_of(source).encode(), digest_size=8).digest()
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


def letters_of(source: str) -> str:
    """What sentences have in common that are not told apart: their letters and digits."""
    return "".join(character for character in source.casefold() if character.isalnum()) or source


def _one_by_one(pairs: list[Pair]) -> list[Sentence]:
    return [Sentence(source, (target,)) for source, target in pairs]


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines, which also splits at characters that stand within sentences.
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataNotFoundError(
            f"translation needs {path}, which does not exist; name an existing file with "
            "experiment.pairs_file, or experiment.source_file and experiment.target_file (with "
            "given splits: experiment.validation_files and experiment.test_files), relative to "
            "data.folder. Without them it trains on a small generated corpus"
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
