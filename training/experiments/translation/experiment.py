"""Translation with a small Transformer, from a file of sentence pairs.

Without a file it trains on a generated corpus: sums in words, English and German.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast.training.configuration.schema import UNLESS_DEFAULT, Section, Split
from holdfast.training.errors import CheckpointMismatchError, DataFormatError
from holdfast.training.experiment.protocol import Batch, Context, Records
from holdfast.training.experiments.translation.bleu import (
    NUM_STATISTICS,
    corpus_bleu,
    sentence_statistics,
    signature,
)
from holdfast.training.experiments.translation.data import (
    Corpus,
    SplitFractions,
    given_corpus,
    hashed_corpus,
    read_files,
)
from holdfast.training.experiments.translation.data import (
    Sentence as CorpusSentence,
)
from holdfast.training.experiments.translation.dataset import Rows, TranslationDataset
from holdfast.training.experiments.translation.graphs import (
    ENCODER,
    STEP,
    GraphTranslator,
    Runner,
    translation_parts,
)
from holdfast.training.experiments.translation.model import ModelSize, TranslationModel
from holdfast.training.experiments.translation.search import (
    Beam,
    Translator,
    beam_search,
    greedy,
)
from holdfast.training.experiments.translation.synthetic import number_pairs
from holdfast.training.experiments.translation.vocabulary import BOS, EOS, PAD, SPECIAL, Vocabulary
from holdfast.training.export.parts import Part
from holdfast.training.export.specification import ExportSpec
from holdfast.training.reporting.figures import Measure, Sentence, Sentences

NUM_SHOWN = 12


class TranslationSettings(Section):
    """Settings of the translation experiment. Files are relative to ``data.folder``."""

    pairs_file: str | None = None
    """Source sentence, tab, target sentence in each line."""
    source_file: str | None = None
    """Source sentences, one a line; together with target_file, in place of pairs_file."""
    target_file: str | None = None
    """Their translations, line by line."""
    validation_files: tuple[str, ...] = Field((), max_length=2, json_schema_extra=UNLESS_DEFAULT)
    """Validation pairs that somebody else fixed: one file as pairs_file, or two, as source_file and
    target_file. Together with test_files, in place of the fractions."""
    test_files: tuple[str, ...] = Field((), max_length=2, json_schema_extra=UNLESS_DEFAULT)
    """Test pairs, in the same way."""
    num_generated: int = Field(2000, ge=100, le=10_000)
    """Pairs of the generated corpus, which is used where no file is named."""
    validation_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Fraction of the distinct source sentences that validate."""
    test_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Fraction of the distinct source sentences that test."""
    vocabulary_size: int = Field(400, ge=259, le=100_000)
    """Largest number of subwords, both languages together."""
    max_tokens: int = Field(32, ge=4, le=1024)
    """Longer training pairs are left out; longer sources are cut off, translations end here."""
    width: int = Field(64, ge=2)
    """Features of a token."""
    num_layers: int = Field(1, ge=1)
    """Layers of the encoder, and of the decoder."""
    num_heads: int = Field(4, ge=1)
    """Attention heads; divides the width."""
    feedforward: int = Field(256, ge=1)
    """Features between the two linear maps of a layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Probability of dropping a feature."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Part of the target's probability that is spread over all symbols while training."""
    num_validation_translations: int = Field(50, ge=0)
    """Validation sentences that are translated, for BLEU; the loss is measured on all."""
    beam_size: int = Field(4, ge=1)
    """Hypotheses that the search keeps for each sentence; 1 is greedy."""
    length_penalty: float = Field(0.6, ge=0)
    """Exponent by which long hypotheses are favoured."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source_file is None) != (self.target_file is None):
            raise ValueError("source_file and target_file are named together, or neither is")
        if self.pairs_file is not None and self.source_file is not None:
            raise ValueError("name pairs_file, or source_file and target_file, not both")
        self._require_given_whole()
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    def _require_given_whole(self) -> None:
        if bool(self.validation_files) != bool(self.test_files):
            raise ValueError("validation_files and test_files are named together, or neither is")
        if self.test_files and not self.training_files():
            raise ValueError(
                "validation_files and test_files need training pairs of yours: name pairs_file, or "
                "source_file and target_file"
            )

    def training_files(self) -> tuple[str, ...]:
        """One file of pairs, two files whose lines belong together, or none."""
        names = self.pairs_file, self.source_file, self.target_file
        return tuple(name for name in names if name is not None)


class Translation:
    """Translate sentences; the loss is that of a token, the figure to report is BLEU.

    Training sees each pair. Validation and test see each source sentence once: the loss is that of
    its first translation, BLEU counts all of them as references.
    """

    Settings = TranslationSettings
    defaults: ClassVar[dict[str, Any]] = {
        "data": {"batch_tokens": 512, "evaluation_batch_size": 64},
        "train": {"num_epochs": 15, "clip_norm": 1.0},
        "optimizer": {"name": "AdamW", "args": {"lr": 5e-3, "betas": [0.9, 0.98]}},
        "scheduler": {
            "name": "InverseSquareRoot",
            "args": {"timescale_steps": 200},
            "interval": "step",
        },
        "warmup": {"num_steps": 100, "start_factor": 0.01},
        "ema": {"decays": [0.99]},
        "selection": {"metric": "loss", "mode": "min"},
    }

    def __init__(self, context: Context) -> None:
        self._settings: TranslationSettings = context.settings
        self._folder = context.data_folder or Path()

    @cached_property
    def _corpus(self) -> Corpus:
        """The whole of it; the numbers of its sentences are those of the data sets."""
        settings, names = self._settings, self._settings.training_files()
        pairs = read_files(self._folder, names) if names else number_pairs(settings.num_generated)
        if settings.test_files:
            given = settings.validation_files, settings.test_files
            return given_corpus(pairs, *(read_files(self._folder, files) for files in given))
        fractions = SplitFractions(settings.validation_fraction, settings.test_fraction)
        return hashed_corpus(pairs, fractions)

    @property
    def _sentences(self) -> Sequence[CorpusSentence]:
        return self._corpus.sentences

    def _numbers(self, split: Split) -> Sequence[int]:
        chosen = self._corpus.numbers[split]
        if not chosen:
            raise DataFormatError(
                f"none of the {len(self._sentences)} distinct source sentences falls into the "
                f"split {split}; use more data or a larger experiment.{split}_fraction"
            )
        return chosen

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Learnt from the training pairs alone; the same bytes from the same pairs."""
        sentences = [self._sentences[number] for number in self._numbers("train")]
        texts = (text for one in sentences for text in (one.source, *one.translations))
        return Vocabulary.learn(texts, self._settings.vocabulary_size)

    def dataset(self, split: Split) -> TranslationDataset:
        """All pairs of ``train``; each source sentence of the others once, padded to one width."""
        settings, numbers = self._settings, self._numbers(split)
        is_training = split == "train"
        pairs = [
            (number, self._sentences[number].source, translation)
            for number in numbers
            for translation in self._sentences[number].translations[: None if is_training else 1]
        ]
        sources = self.vocabulary.encode([source for _, source, _ in pairs])
        targets = self.vocabulary.encode([target for _, _, target in pairs])
        most = settings.max_tokens - 1  # EOS is one of them
        kept = [
            (number, [*source[:most], EOS], [BOS, *target[:most], EOS])
            for (number, _, _), source, target in zip(pairs, sources, targets, strict=True)
            if not is_training or max(len(source), len(target)) <= most
        ]
        if not kept:
            raise DataFormatError(
                f"all training pairs are longer than experiment.max_tokens = {settings.max_tokens} "
                "tokens, the mark of the end included; raise it"
            )
        return TranslationDataset(
            Rows([source for _, source, _ in kept]),
            Rows([target for _, _, target in kept]),
            np.array([number for number, _, _ in kept]),
            num_translated=len(kept) if split == "test" else settings.num_validation_translations,
            width=None if is_training else settings.max_tokens,
            fingerprint=self._fingerprint(numbers),
        )

    def model(self) -> TranslationModel:
        """A Transformer over the vocabulary's symbols."""
        return self._build(TranslationModel)

    def model_size(self) -> ModelSize:
        """The configured size."""
        settings = self._settings
        return ModelSize(
            num_symbols=self.vocabulary.size,
            max_tokens=settings.max_tokens,
            width=settings.width,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            feedforward=settings.feedforward,
            dropout=settings.dropout,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy with label smoothing (Szegedy et al. 2016), the mean over tokens."""
        (source, target), _ = batch
        own, uniform = model(source, target)
        smoothing = self._settings.label_smoothing
        costs: Tensor = (1 - smoothing) * own + smoothing * uniform
        return costs.sum() / num_tokens(target).sum()

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Per sentence: ``nll`` in nats (no smoothing), ``num_tokens``, ``sentence``.

        A model that can decode also gives ``hypothesis`` [B, max_tokens] and ``bleu_statistics``
        [B, 10], both zero where a sentence is not to be translated.
        """
        (source, target), (sentence, is_translated) = batch
        own, _ = model(source, target)
        records = {
            "nll": own.float().sum(1),
            "num_tokens": num_tokens(target),
            "sentence": sentence,
        }
        if isinstance(model, TranslationModel):
            hypothesis = torch.zeros_like(source)
            if bool(is_translated.any()):
                hypothesis[is_translated] = self.translate(model, source[is_translated])
            statistics = self.statistics(hypothesis, sentence, is_translated)
            records |= {"hypothesis": hypothesis, "bleu_statistics": statistics}
        return records

    def translate(self, translator: Translator, source: Tensor) -> Tensor:
        """Hypotheses [B, max_tokens] by the configured search."""
        settings = self._settings
        if settings.beam_size == 1:
            return greedy(translator, source, settings.max_tokens)
        beam = Beam(settings.beam_size, settings.length_penalty)
        return beam_search(translator, source, settings.max_tokens, beam)

    def statistics(self, hypothesis: Tensor, sentence: Tensor, is_translated: Tensor) -> Tensor:
        """Counts for BLEU, int64 [B, 10]; zero where a sentence is not translated."""
        rows = torch.zeros(len(hypothesis), NUM_STATISTICS, dtype=torch.int64)
        chosen = is_translated.cpu()
        texts = self.vocabulary.decode(hypothesis.cpu()[chosen].tolist())
        references = [self._sentences[i].translations for i in sentence.cpu()[chosen].tolist()]
        rows[chosen] = torch.from_numpy(sentence_statistics(texts, references))
        return rows

    def metrics(self, records: Records) -> dict[str, float]:
        """``loss`` in nats a token; ``bleu``, 0 to 100; each where the records have what it needs.

        Both are functions of sums over sentences.
        """
        metrics = {}
        if "nll" in records:
            total, num = records["nll"].sum(dtype=np.float64), records["num_tokens"].sum()
            metrics["loss"] = float(total / num)
        if "bleu_statistics" in records:
            metrics["bleu"] = corpus_bleu(records["bleu_statistics"])
        return metrics

    def figures(self, measure: Measure) -> tuple[Sentences]:
        """Some validation sentences and what becomes of them."""
        dataset = self.dataset("validation")
        records = measure(dataset)
        translated = np.flatnonzero(records["bleu_statistics"].any(axis=1))
        spread = np.linspace(0, len(translated) - 1, min(NUM_SHOWN, len(translated)))
        chosen = translated[spread.round().astype(np.int64)]
        outputs = self.vocabulary.decode(records["hypothesis"][chosen].tolist())
        shown = [self._sentences[number] for number in records["sentence"][chosen]]
        return (
            Sentences(
                title="Translations",
                data=(
                    f"{len(shown)} of {len(dataset)} validation sentences, in the corpus's order; "
                    f"BLEU is sacrebleu's {signature()}"
                ),
                rows=tuple(
                    Sentence(one.source, one.translations[0], output)
                    for one, output in zip(shown, outputs, strict=True)
                ),
            ),
        )

    def state_dict(self) -> dict[str, str]:
        """What figures of this run mean: how BLEU is counted, and which vocabulary it is."""
        return {"bleu_signature": signature(), "vocabulary": self._vocabulary_digest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointMismatchError where this process has learnt another vocabulary."""
        if state["vocabulary"] != self._vocabulary_digest():
            raise CheckpointMismatchError(
                f"the checkpoint's vocabulary has digest {state['vocabulary']}, the one learnt "
                f"from the training text here {self._vocabulary_digest()}; take the version of "
                "tokenizers that it was learnt with, and the same data"
            )

    def export_parts(self) -> Mapping[str, Part]:
        """The encoder, and one step of the decoder."""
        probes = {name: (source,) for name, (source, _) in self._probes().items()}
        return translation_parts(self._build, probes)

    def assemble(self, runs: Mapping[str, Runner], batch: Batch) -> Mapping[str, Tensor]:
        """Greedy translations and their counts for BLEU."""
        (source, _), (sentence, is_translated) = batch
        translator = GraphTranslator(runs[ENCODER], runs[STEP], self.model_size())
        hypothesis = greedy(translator, source, self._settings.max_tokens)
        statistics = self.statistics(hypothesis, sentence, is_translated)
        return {"hypothesis": hypothesis, "bleu_statistics": statistics}

    def export_files(self) -> Mapping[str, bytes]:
        """The vocabulary, as the tokenizers library and others read it."""
        return {"tokenizer.json": self.vocabulary.serialized}

    def export_spec(self) -> ExportSpec:
        """Names of what goes in and comes out."""
        return ExportSpec(
            input_names=("source", "target"),
            output_names=("nll", "uniform_nll"),
            description=(
                "What each token of a translation costs in nats, given the source sentence. Tokens "
                "are those of the tokenizers library's file that is the weights' tensor "
                f"'vocabulary'; {PAD} pads, {BOS} begins a target, {EOS} ends source and target. "
                "`nll` is the token's own cost, `uniform_nll` the mean cost of all tokens in its "
                "place, which label smoothing needs. To translate, run `parts/encoder` once and "
                "`parts/decoder_step` for each token; text becomes tokens by `tokenizer.json`. "
                f"BLEU, by beam search, is sacrebleu's {signature()}."
                f"{self._corpus.note(self._settings.test_files)}"
            ),
            probes=self._probes(),
            task="translation",
        )

    def _probes(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Source and target of no words, and of as many as there may be; two sentences of each."""
        most = self._settings.max_tokens - 1
        words = [len(SPECIAL) + n % (self.vocabulary.size - len(SPECIAL)) for n in range(most)]
        padding = [PAD] * most
        rows = {
            "shortest": ([EOS, *padding], [BOS, EOS, *padding]),
            "longest": ([*words, EOS], [BOS, *words, EOS]),
        }
        return {
            name: (torch.tensor([source] * 2), torch.tensor([target] * 2))
            for name, (source, target) in rows.items()
        }

    def _build(self, of_class: type[TranslationModel]) -> TranslationModel:
        return of_class(self.model_size(), self.vocabulary.serialized)

    def _vocabulary_digest(self) -> str:
        return hashlib.sha256(self.vocabulary.serialized).hexdigest()

    def _fingerprint(self, numbers: Sequence[int]) -> str:
        """Digest of the vocabulary and of a split's texts."""
        return self._corpus.fingerprint(numbers, self.vocabulary.serialized)


def num_tokens(target_BT: Tensor) -> Tensor:
    """Tokens that a target costs: all but BOS and padding, int64 [B]."""
    return (target_BT[:, 1:] != PAD).sum(1)
