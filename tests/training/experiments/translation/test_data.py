from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.errors import DataFormatError, DataNotFoundError
from holdfast.training.experiments.translation.data import (
    Sentence,
    SplitFractions,
    given_corpus,
    hashed_corpus,
    read_files,
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


def test_a_hashed_corpus_has_each_sentence_in_the_split_of_its_letters() -> None:
    pairs = [(f"sentence {number % 40}", f"Satz {number}") for number in range(80)]
    corpus = hashed_corpus(pairs, FRACTIONS)
    assert list(corpus.sentences) == sentences_of(pairs)
    assert sorted(n for numbers in corpus.numbers.values() for n in numbers) == list(range(40))
    for split, numbers in corpus.numbers.items():
        assert {split_of(corpus.sentences[n].source, FRACTIONS) for n in numbers} == {split}


def test_given_files_stay_whole_and_training_loses_what_they_have(
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = [("One.", "Eins."), ("two", "zwei"), ("two", "zwo"), ("Three", "Drei"), ("4", "4")]
    validation = [("one", "eins"), ("Six", "Sechs"), ("Six", "sechs")]
    test = [("THREE!", "drei"), ("six.", "sechs")]
    corpus = given_corpus(training, validation, test)
    assert {split: list(numbers) for split, numbers in corpus.numbers.items()} == {
        "train": [0, 1],
        "validation": [2, 3, 4],
        "test": [5, 6],
    }
    assert corpus.sentences[:2] == (Sentence("two", ("zwei", "zwo")), Sentence("4", ("4",)))
    assert corpus.sentences[2:] == tuple(Sentence(s, (t,)) for s, t in (*validation, *test))
    assert corpus.num_left_out == 2
    [message] = caplog.messages
    assert message.startswith("of 4 distinct source sentences to train on, 2 are left out")
    assert "1 sentences are in both" in message


def test_given_files_that_share_nothing_with_training_say_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    corpus = given_corpus([("a", "b")], [("c", "d")], [("e", "f")])
    assert corpus.num_left_out == 0
    assert caplog.messages == []


def test_given_files_with_all_of_training_are_refused() -> None:
    with pytest.raises(DataFormatError, match="all 2 distinct source sentences to train on are in"):
        given_corpus([("a", "b"), ("c", "d")], [("A", "b")], [("C.", "d")])


def test_a_split_is_read_from_one_file_or_two(tmp_path: Path) -> None:
    written(tmp_path / "pairs", b"one\teins\n")
    written(tmp_path / "source", b"one\n")
    written(tmp_path / "target", b"eins\n")
    found = [read_files(tmp_path, names) for names in (["pairs"], ["source", "target"])]
    assert found == [[("one", "eins")]] * 2


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
