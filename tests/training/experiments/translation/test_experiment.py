from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch

from holdfast.training.data.batch_plan import TokenPlan
from holdfast.training.errors import CheckpointMismatchError, ConfigError, DataFormatError
from holdfast.training.experiment.protocol import Context, Dataset, Records
from holdfast.training.experiments.translation.bleu import (
    corpus_bleu,
    sentence_statistics,
    signature,
)
from holdfast.training.experiments.translation.experiment import Translation, TranslationSettings
from holdfast.training.experiments.translation.vocabulary import EOS, SPECIAL, Vocabulary
from holdfast.training.loop.evaluation import evaluate
from tests.faults.campaign import (
    Training,
    complete,
    differences,
    final_state,
    kill_at_fault_point,
)

SMALL = {"num_generated": 200, "width": 16, "num_heads": 2, "feedforward": 16, "max_tokens": 24}
OVERRIDES = (
    "experiment.num_generated=1000",
    "train.num_epochs=10",
    "train.num_threads=1",
    "checkpoint.is_auto=false",
    "checkpoint.every_steps=7",
)


def experiment(folder: Path | None = None, **settings: Any) -> Translation:
    return Translation(Context(TranslationSettings(**{**SMALL, **settings}), folder))


def test_the_same_text_gives_the_same_vocabulary_and_text_comes_back() -> None:
    texts = ["Größe ist nicht alles.", "größer, größte </s> 😀", "not all"] * 3
    one, other = Vocabulary.learn(texts, 300), Vocabulary.learn(texts, 300)
    assert one.serialized == other.serialized
    assert one.decode([[*ids, EOS, 7] for ids in one.encode(texts)]) == texts
    assert not {0, 1, 2} & {number for ids in one.encode([*texts, *SPECIAL]) for number in ids}
    assert Vocabulary(one.serialized).encode(texts) == one.encode(texts)


def test_a_vocabulary_that_cannot_hold_all_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocabulary_size = 100 is too small.* need 259"):
        Vocabulary.learn(["text"], 100)


def test_bleu_from_rows_of_sentences_is_sacrebleus_of_the_corpus() -> None:
    hypotheses = ["the cat sat on the mat", "a dog", "", "hello there, my old friend!"]
    references = [
        ["the cat sat on a mat", "a cat was on the mat"],
        ["the dog"],
        ["nothing"],
        ["hello my old friend!", "hello there, my friend!", "hi there, old friend!"],
    ]
    rows = sentence_statistics(hypotheses, references)
    for chosen in ([0, 1, 2, 3], [3, 3, 0], [0, 2]):
        streams: list[Any] = [
            [own[n] if n < len(own) else None for own in (references[i] for i in chosen)]
            for n in range(3)
        ]
        wanted = sacrebleu.corpus_bleu([hypotheses[i] for i in chosen], streams).score
        assert corpus_bleu(rows[chosen]) == pytest.approx(wanted, abs=1e-12)
    assert signature().startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_no_source_sentence_is_in_two_splits_and_the_vocabulary_is_learnt_from_training() -> None:
    found = experiment()
    numbers = {
        split: set(found._numbers(split))  # type: ignore[arg-type]
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, numbers.values())) == 200 == len(set.union(*numbers.values()))
    training = [found._sentences[number] for number in sorted(numbers["train"])]
    texts = [text for one in training for text in (one.source, *one.translations)]
    assert found.vocabulary.serialized == Vocabulary.learn(texts, 400).serialized
    assert bytes(found.model().vocabulary.tolist()) == found.vocabulary.serialized


def test_training_sees_every_pair_and_testing_every_sentence_once(tmp_path: Path) -> None:
    lines = [f"source number {i}\tZiel {i} {n}" for i in range(60) for n in range(2)]
    lines.append(" ".join(map(str, range(100))) + "\tis too long to be trained on")
    (tmp_path / "pairs.txt").write_text("\r\n".join(lines))
    found = experiment(tmp_path, pairs_file="pairs.txt")
    datasets = [found.dataset(split) for split in ("train", "validation", "test")]
    assert len(datasets[0]) + 2 * (len(datasets[1]) + len(datasets[2])) == 120
    assert max(datasets[0].lengths) <= 24
    (source, target), (sentence, is_translated) = datasets[2].fetch([0, 1])
    assert (source.shape, target.shape) == ((2, 24), (2, 25))
    assert is_translated.tolist() == [True, True]
    assert len(found._sentences[int(sentence[0])].translations) == 2


def test_a_step_has_at_most_the_configured_tokens() -> None:
    dataset = experiment().dataset("train")
    plan = TokenPlan(dataset.lengths, 128, 0)
    for step in range(plan.num_steps(0)):
        (source, target), _ = dataset.fetch(plan.indices(0, step).tolist())
        assert source.numel() <= 128
        assert target[:, :-1].numel() <= 128


def test_a_corpus_without_a_split_says_so(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("Go.\tGeh.\n")
    with pytest.raises(DataFormatError, match="none of the 1 distinct source sentences falls into"):
        [experiment(tmp_path, pairs_file="pairs.txt").dataset(s) for s in ("train", "validation")]


def test_another_vocabulary_is_not_resumed_with() -> None:
    state = experiment().state_dict()
    experiment().load_state_dict(state)
    with pytest.raises(CheckpointMismatchError, match=r"vocabulary has digest .*tokenizers"):
        experiment(num_generated=201).load_state_dict(state)


def test_metrics_are_those_of_sums_over_sentences() -> None:
    found = experiment(beam_size=1, num_validation_translations=5)
    torch.manual_seed(0)
    model, dataset = found.model(), found.dataset("validation")
    together = evaluate(found, model, dataset, batch_size=64)
    apart = evaluate(found, model, dataset, batch_size=3)
    assert together is not None
    assert apart is not None
    is_translated = together["bleu_statistics"].any(axis=1)
    assert is_translated.sum() == 5
    assert is_translated[[0, -1]].all()
    assert np.array_equal(together["hypothesis"], apart["hypothesis"])
    assert found.metrics(together) == pytest.approx(found.metrics(apart))
    assert found.metrics(together)["loss"] == pytest.approx(
        together["nll"].sum(dtype=float) / together["num_tokens"].sum()
    )


def test_the_report_is_offered_sentences_with_their_translations() -> None:
    found = experiment(num_validation_translations=3)
    torch.manual_seed(0)
    model = found.model()

    def measure(dataset: Dataset) -> Records:
        records = evaluate(found, model, dataset, batch_size=64)
        assert records is not None
        return records

    (figure,) = found.figures(measure)
    assert len(figure.rows) == 3
    sources = {one.source: one.translations[0] for one in found._sentences}
    assert all(sources[row.source] == row.reference for row in figure.rows)


@pytest.mark.slow
def test_it_learns_and_kills_in_mid_epoch_change_no_byte(tmp_path: Path) -> None:
    calm = Training(tmp_path, "calm", "translation", OVERRIDES)
    complete(calm)
    calm_state = final_state(calm.run)
    history = json.loads(calm_state["state.json"])["history"]
    assert history[-1]["metrics"]["bleu"] > 60
    workers = (*OVERRIDES, "data.num_workers=2")
    killed = Training(tmp_path, "killed", "translation", workers)
    assert kill_at_fault_point(killed, "commit.after-rename", 2)
    assert kill_at_fault_point(
        Training(tmp_path, "killed", "translation", OVERRIDES), "write.between", 3
    )
    complete(killed)
    assert differences(calm_state, final_state(killed.run)) == []
