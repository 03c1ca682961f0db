from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.errors import DataFormatError, DataNotFoundError
from holdfast.training.experiments.translation.data import (
    Sentence,
    SplitFractions,
    read_parallel,
    read_tab_separated,
    sentences_of,
    split_of,
)
from holdfast.training.experiments.translation.synthetic import english, german, number_pairs

FRACTIONS = SplitFractions(validation=0.2, test=0.2)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_reads_pairs_whatever_ends_the_lines(tmp_path: Path) -> None:
    content = "\ufeffGo.\tGeh.\r\nHi.\tGru\u0308ß Gott!\tCC-BY 2.0\r\n\r\nRun!\tLauf!"
    pairs = read_tab_separated(written(tmp_path / "pairs.txt", content.encode()))
    assert pairs == [("Go.", "Geh."), ("Hi.", "Grüß Gott!"), ("Run!", "Lauf!")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Go.\tGeh.\nHi.\n", r"line 2: expected a sentence, a tab and its translation.*'Hi\.'"),
        (b"Go.\t \n", "line 1: expected"),
        (b"Go.\tGeh.\nHi.\tGr\xfc\xdf Gott!\n", "line 2: expected UTF-8, found the byte 0xfc"),
        (b"\n", "expected pairs of sentences, found none"),
    ],
)
def test_a_damaged_file_is_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        read_tab_separated(written(tmp_path / "pairs.txt", content))


def test_a_missing_file_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"deu\.txt, which does not exist; name .*pairs_f"):
        read_tab_separated(tmp_path / "deu.txt")


def test_reads_parallel_files_line_by_line(tmp_path: Path) -> None:
    source = written(tmp_path / "source", b"one\r\n\r\nthree\r\n")
    target = written(tmp_path / "target", b"eins\nzwei\ndrei\n")
    assert read_parallel(source, target) == [("one", "eins"), ("three", "drei")]
    written(target, b"eins\nzwei\n")
    with pytest.raises(DataFormatError, match=r"has 3 lines, .* has 2"):
        read_parallel(source, target)


def test_a_sentence_is_in_one_split_however_it_is_spelt() -> None:
    assert {split_of(text, FRACTIONS) for text in ("Go on!", "go on", "Go on.", "GO ON?")} == {
        split_of("Go on", FRACTIONS)
    }
    splits = [split_of(f"sentence {number}", FRACTIONS) for number in range(1000)]
    assert 150 < splits.count("validation") < 250
    assert 150 < splits.count("test") < 250


def test_a_sentence_is_listed_once_with_all_its_translations() -> None:
    pairs = [("Run!", "Lauf!"), ("Hi.", "Hallo!"), ("Run!", "Renn!"), ("Run!", "Lauf!")]
    assert sentences_of(pairs) == [
        Sentence("Run!", ("Lauf!", "Renn!")),
        Sentence("Hi.", ("Hallo!",)),
    ]


@pytest.mark.parametrize(
    ("number", "in_english", "in_german"),
    [
        (0, "zero", "null"),
        (16, "sixteen", "sechzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (70, "seventy", "siebzig"),
        (100, "one hundred", "einhundert"),
        (187, "one hundred and eighty-seven", "einhundertsiebenundachtzig"),
    ],
)
def test_spells_numbers(number: int, in_english: str, in_german: str) -> None:
    assert (english(number), german(number)) == (in_english, in_german)


def test_the_generated_corpus_has_no_sentence_twice() -> None:
    assert len({source for source, _ in number_pairs(10_000)}) == 10_000
