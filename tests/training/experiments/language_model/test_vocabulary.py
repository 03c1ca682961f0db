from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.bundles.continuing import TextError, Vocabulary, read_prompt
from holdfast.training.experiments.language_model.synthetic import generated_text
from holdfast.training.experiments.language_model.vocabulary import characters_of, learnt_from

TEXT = "Größe, größer, am größten: \t nicht alles 😀\r\n\n" * 5 + generated_text(40)
LEARNT = learnt_from(TEXT, 300)


@pytest.mark.parametrize("vocabulary", [characters_of(TEXT), LEARNT])
def test_a_text_comes_back_and_the_bytes_of_a_vocabulary_are_all_of_it(
    vocabulary: Vocabulary,
) -> None:
    numbers = vocabulary.encode(TEXT)
    again = Vocabulary.parse(vocabulary.serialized)
    assert vocabulary.decode(numbers) == TEXT
    assert max(numbers) < vocabulary.size == len(again.bytes_of)
    assert again.encode(TEXT) == numbers
    assert sum(len(vocabulary.bytes_of[number]) for number in numbers) == len(TEXT.encode())


@given(st.text())
def test_learnt_symbols_know_every_text(text: str) -> None:
    assert LEARNT.decode(LEARNT.encode(text)) == text


def test_the_most_frequent_pair_is_merged_first_and_none_that_is_there_once() -> None:
    vocabulary = learnt_from("low lower lowest lo", 1000)
    pairs = Counter(vocabulary.merges)
    assert vocabulary.merges[0] == (ord("l"), ord("o"))
    assert max(pairs.values()) == 1
    assert b" lowe" in vocabulary.bytes_of
    assert b" lowest" not in vocabulary.bytes_of
    assert learnt_from("low lower lowest lo", 258).size == 258


def test_a_character_that_is_not_known_is_named_with_its_place() -> None:
    with pytest.raises(
        TextError, match=r"line 2, column 3: .* the character 'Q'; it knows '\\nab'"
    ):
        characters_of("ab\n").encode("ab\nbaQ")


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b'{"kind":"bpe","version":2,"merges":[]}',
        b'{"kind":"words","version":1}',
        b'{"kind":"characters","version":1,"symbols":"aa"}',
        b'{"kind":"characters","version":1}',
        b'{"kind":"bpe","version":1,"merges":[[0,256]]}',
        b'{"kind":"bpe","version":1,"merges":[[0,true]]}',
        b'{"kind":"bpe","version":1,"merges":[7]}',
    ],
)
def test_what_is_no_vocabulary_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Vocabulary.parse(content)


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    with pytest.raises(TextError, match="cannot be read: No such file"):
        read_prompt(path)
    path.write_bytes(b"ab\xff")
    with pytest.raises(TextError, match="byte 2 is no character"):
        read_prompt(path)
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_prompt(path) == "one\ntwo"


def test_a_vocabulary_is_json_that_any_program_reads() -> None:
    told = json.loads(characters_of("ba").serialized)
    assert told == {"kind": "characters", "symbols": "ab", "version": 1}
