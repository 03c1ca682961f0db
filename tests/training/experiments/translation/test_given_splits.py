"""Validation and test pairs that somebody else fixed, in the place of hashed splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.training.configuration.loading import (
    config_digest,
    config_from_record,
    resolve_config,
    validated,
)
from holdfast.training.errors import ConfigError, DataFormatError, DataNotFoundError
from holdfast.training.experiment.protocol import Context
from holdfast.training.experiments.translation.data import given_corpus, letters_of, read_files
from holdfast.training.experiments.translation.experiment import Translation, TranslationSettings
from holdfast.training.experiments.translation.vocabulary import Vocabulary
from tests.faults.campaign import Training

SMALL = {"width": 16, "num_heads": 2, "feedforward": 16, "max_tokens": 24}


def given(folder: Path, **settings: Any) -> Translation:
    """Pairs 0 to 59 to train on, of which two are among the validation pairs; 60 to 62 test."""
    for name, numbers in (("train", range(60)), ("validation", (3, 9)), ("test", range(60, 63))):
        lines = [f"source number {i}\tZiel {i}" for i in numbers]
        (folder / name).write_text("\n".join(lines))
    named = {"pairs_file": "train", "validation_files": ["validation"], "test_files": ["test"]}
    table = {**SMALL, **named, **settings}
    chosen = validated(TranslationSettings, table, prefix="experiment.")
    return Translation(Context(chosen, folder))


def test_given_files_are_the_splits_and_training_keeps_the_rest(tmp_path: Path) -> None:
    found = given(tmp_path)
    assert [len(found.dataset(split)) for split in ("train", "validation", "test")] == [58, 2, 3]
    _, (sentence, is_translated) = found.dataset("test").fetch([0, 2])
    sources = [found._sentences[number].source for number in sentence.tolist()]
    assert sources == ["source number 60", "source number 62"]
    assert is_translated.all()
    texts = [text for i in range(60) if i not in (3, 9)
             for text in (f"source number {i}", f"Ziel {i}")]  # fmt: skip
    assert found.vocabulary.serialized == Vocabulary.learn(texts, 400).serialized
    note = " Tested on test, line by line; 2 source sentences of the validation and test files"
    assert note in found.export_spec().description
    assert (
        "Tested on"
        not in Translation(Context(TranslationSettings(**SMALL))).export_spec().description
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_files": []}, "validation_files and test_files are named together"),
        ({"validation_files": []}, "validation_files and test_files are named together"),
        ({"pairs_file": None}, "need training pairs of yours: name pairs_file"),
        ({"test_files": ["a", "b", "c"]}, r"experiment\.test_files"),
    ],
)
def test_a_split_that_is_half_given_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        given(tmp_path, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, DataNotFoundError, r"other, which does not exist.*experiment\.test_files"),
        ("", DataFormatError, "other: expected pairs of sentences, found none"),
        ("one column\n", DataFormatError, "other, line 1: expected a sentence, a tab and its"),
    ],
)
@pytest.mark.parametrize("setting", ["validation_files", "test_files"])
def test_a_given_file_that_is_none_is_refused_before_training(
    tmp_path: Path, setting: str, content: str | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "other").write_text(content)
    with pytest.raises(error, match=message) as raised:
        given(tmp_path, **{setting: ["other"]}).dataset("train")
    assert "\n" not in str(raised.value)


def test_a_split_that_is_not_given_is_no_part_of_a_configuration() -> None:
    config = resolve_config(settings_class=TranslationSettings)
    assert not {"validation_files", "test_files"} & set(config.experiment)
    named = ['experiment.pairs_file="a"', 'experiment.validation_files=["b"]',
             'experiment.test_files=["c","d"]']  # fmt: skip
    asked = resolve_config(settings_class=TranslationSettings, overrides=named)
    assert asked.experiment["test_files"] == ["c", "d"]
    others = [*named[:2], 'experiment.test_files=["c"]']
    other = resolve_config(settings_class=TranslationSettings, overrides=others)
    assert config_digest(asked) != config_digest(other)
    assert config_from_record(asked.model_dump(mode="json")) == asked


@pytest.mark.slow
def test_a_training_with_given_files_is_exact_and_says_what_it_left_out(tmp_path: Path) -> None:
    given(tmp_path)
    overrides = (*(f"experiment.{name}={value}" for name, value in SMALL.items()),
                 "experiment.pairs_file=train", 'experiment.validation_files=["validation"]',
                 'experiment.test_files=["test"]', f"data.folder={tmp_path}",
                 "train.num_epochs=3", "train.num_threads=1")  # fmt: skip
    training = Training(tmp_path / "store", "one", "translation", overrides)
    segment = training.start()
    assert segment.finish() == 0, segment.errors
    assert "of 60 distinct source sentences to train on, 2 are left out" in "".join(
        [*segment.errors, *map(str, segment.events)]
    )
    recorded = json.loads(training.run.run_json.read_text())["config"]["experiment"]
    assert recorded["test_files"] == ["test"]


def test_of_tatoebas_sentences_none_that_is_given_is_trained_on(
    shared_data: Path, tmp_path: Path
) -> None:
    lines = (shared_data / "tatoeba_deu_eng" / "deu.txt").read_text().splitlines()
    chosen = {"train": lines, "validation": lines[::500], "test": lines[7::100]}
    for name, own in chosen.items():
        (tmp_path / name).write_text("\n".join(own))
    corpus = given_corpus(*(read_files(tmp_path, [name]) for name in chosen))
    letters = [
        {letters_of(corpus.sentences[number].source) for number in numbers}
        for numbers in corpus.numbers.values()
    ]
    assert not letters[0] & (letters[1] | letters[2])
    assert [len(numbers) for numbers in corpus.numbers.values()][1:] == [101, 500]
    # Some sentences stand in several lines, of which not all were chosen.
    assert corpus.num_left_out > 400
