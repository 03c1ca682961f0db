"""A language model on a text: what each next token costs, and how a text goes on.

Without a text it trains on generated sentences.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast.training.bundles import continuing
from holdfast.training.bundles.continuing import VOCABULARY, Vocabulary
from holdfast.training.configuration.schema import UNLESS_DEFAULT, Section, Split
from holdfast.training.errors import CheckpointMismatchError, DataFormatError
from holdfast.training.experiment.protocol import Batch, Context, Records
from holdfast.training.experiments.language_model.dataset import Windows
from holdfast.training.experiments.language_model.graphs import (
    Runner,
    continuation,
    parts,
    runs_of,
)
from holdfast.training.experiments.language_model.model import Gpt, ModelSize
from holdfast.training.experiments.language_model.synthetic import generated_text
from holdfast.training.experiments.language_model.text import read_text, split_text
from holdfast.training.experiments.language_model.tokens import TokenFile, stored_tokens
from holdfast.training.experiments.language_model.vocabulary import characters_of, learnt_from
from holdfast.training.export.parts import Part
from holdfast.training.export.specification import ExportSpec
from holdfast.training.reporting.figures import Measure, Sentence, Sentences

NUM_SHOWN = 8
PROGRAM = "continue_text.py"


class LanguageModelSettings(Section):
    """Settings of the language model. Files are relative to ``data.folder``."""

    text_files: tuple[str, ...] = ()
    """UTF-8 files or stream files, read one after the other. None: all .txt files of data.folder,
    by their names, or else all its stream files; without a data.folder, a generated text."""
    text_field: str = Field("text", min_length=1, json_schema_extra=UNLESS_DEFAULT)
    """Field of a stream file's sample that holds its text; of a tar, the suffix."""
    num_generated: int = Field(3000, ge=50, le=1_000_000)
    """Sentences of the generated text."""
    validation_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Part of the text that validates; it comes after what trains."""
    test_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Part of the text that tests: its end."""
    vocabulary: Literal["characters", "bpe"] = "characters"
    """Characters of the whole text, or byte pairs that are learnt from what trains."""
    vocabulary_size: int = Field(512, ge=257, le=65536)
    """Largest number of symbols of a learnt vocabulary; all 256 bytes are among them."""
    context: int = Field(32, ge=2, le=65536)
    """Tokens that the model sees at once."""
    width: int = Field(64, ge=2)
    """Features of a token."""
    num_layers: int = Field(2, ge=1)
    """Blocks of attention and feed-forward network."""
    num_heads: int = Field(4, ge=1)
    """Attention heads; divides the width."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a feature."""
    has_biases: bool = False
    """Whether linear layers and norms have a bias."""
    positions: Literal["learnt", "rotary"] = "learnt"
    """How the model knows where a token stands."""
    weight_decay: float = Field(0.1, ge=0)
    """Of matrices and embeddings; norms and biases have none."""
    num_continuations: int = Field(32, ge=0)
    """Windows of validation and test whose second half the model writes."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        if self.positions == "rotary" and self.width // self.num_heads % 2:
            raise ValueError(
                f"rotary positions turn pairs of features, and a head has width / num_heads = "
                f"{self.width // self.num_heads}: make it even"
            )
        return self


class LanguageModel:
    """Tell the next token; the loss is that of a token in nats."""

    Settings: ClassVar[type[LanguageModelSettings]] = LanguageModelSettings
    defaults: ClassVar[dict[str, Any]] = {
        "data": {"batch_size": 32, "evaluation_batch_size": 64},
        "train": {"num_epochs": 8, "steps_per_epoch": 50, "clip_norm": 1.0},
        "optimizer": {"name": "AdamW", "args": {"lr": 3e-3, "betas": [0.9, 0.99]}},
        "warmup": {"num_steps": 20, "start_factor": 0.05},
        "scheduler": {
            "name": "CosineAnnealingLR",
            "args": {"T_max": 380, "eta_min": 3e-4},
            "interval": "step",
        },
        "ema": {"decays": [0.99]},
        "selection": {"metric": "loss", "mode": "min"},
    }

    def __init__(self, context: Context) -> None:
        self._settings: Any = context.settings
        self._folder: Path | None = context.data_folder

    @cached_property
    def _texts(self) -> dict[Split, str]:
        settings = self._settings
        if self._folder is None and not settings.text_files:
            text = generated_text(settings.num_generated)
        else:
            text = read_text(self._folder or Path(), settings.text_files, settings.text_field)
        return split_text(text, settings.validation_fraction, settings.test_fraction)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The same bytes from the same text."""
        if self._settings.vocabulary == "characters":
            return characters_of("".join(self._texts.values()))
        return learnt_from(self._texts["train"], self._settings.vocabulary_size)

    @cached_property
    def _files(self) -> dict[Split, TokenFile]:
        return stored_tokens(self._texts, self.vocabulary)

    def dataset(self, split: Split) -> Windows:
        """Windows at every place of what trains; side by side in what validates and tests."""
        settings, file = self._settings, self._files[split]
        if file.num_tokens <= settings.context:
            raise DataFormatError(
                f"the split {split} has {file.num_tokens} tokens, and a window needs "
                f"{settings.context + 1}: take more text, a larger fraction of it, or a smaller "
                f"experiment.context"
            )
        is_training = split == "train"
        return Windows(
            file,
            settings.context,
            stride=1 if is_training else settings.context,
            num_continued=0 if is_training else settings.num_continuations,
            fingerprint=f"{file.digest} {self._vocabulary_digest()}",
        )

    def model(self) -> nn.Module:
        """A GPT over the vocabulary's symbols."""
        return self.plain_model()

    def plain_model(self, of_class: type[Gpt] = Gpt) -> Gpt:
        """A fresh GPT of the configured size."""
        settings = self._settings
        size = ModelSize(
            num_symbols=self.vocabulary.size,
            context=settings.context,
            width=settings.width,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            dropout=settings.dropout,
            has_biases=settings.has_biases,
            is_rotary=settings.positions == "rotary",
        )
        return of_class(size, self.vocabulary.serialized)

    def parameter_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Matrices and embeddings decay; norms and biases do not.

        Raises CheckpointMismatchError where the model has taken weights of another vocabulary.
        """
        self._require_vocabulary_of(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in trained if parameter.dim() > 1]
        others = [parameter for parameter in trained if parameter.dim() <= 1]
        groups = [
            {"name": "decay", "params": decayed, "weight_decay": self._settings.weight_decay},
            {"name": "no_decay", "params": others, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy in nats, the mean over tokens."""
        (tokens, following), _ = batch
        costs: Tensor = model(tokens, following)
        return costs.mean()

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Per window: ``nll`` in nats, ``num_tokens`` and ``num_bytes`` of what is told.

        A model that can go on by itself, which one in slices cannot, also gives ``continuation``
        [B, C / 2], zeros where a window is not to be continued, and ``is_continued``.
        """
        (tokens, following), is_continued = batch
        costs = model(tokens, following).double()
        records = {
            "nll": costs.sum(1),
            "num_tokens": torch.full_like(is_continued, tokens.shape[1], dtype=torch.int64),
            "num_bytes": self._num_bytes.to(following.device)[following].sum(1),
        }
        if type(model) is Gpt:  # neither an export's stand-in nor one in slices, a class of torch's
            records |= self._continued(runs_of(model), batch)
        return records

    def metrics(self, records: Records) -> dict[str, float]:
        """``loss`` in nats a token, ``bits_per_byte`` of the text, ``perplexity`` of a token."""
        if "nll" not in records:
            return {}
        nats = float(records["nll"].sum(dtype=np.float64))
        loss = nats / int(records["num_tokens"].sum())
        bits_per_byte = nats / math.log(2) / int(records["num_bytes"].sum())
        # Where training diverged, exp would overflow.
        return {
            "loss": loss,
            "bits_per_byte": bits_per_byte,
            "perplexity": math.exp(min(loss, 700.0)),
        }

    def figures(self, measure: Measure) -> tuple[Sentences]:
        """Some windows of validation: how they begin, how they go on, and what the model writes."""
        dataset = self.dataset("validation")
        records = measure(dataset)
        chosen = np.flatnonzero(records["is_continued"])[:NUM_SHOWN]
        rows = []
        for index in chosen.tolist():
            tokens = dataset[index][0][0].tolist()
            added = records["continuation"][index].tolist()
            known = len(tokens) - len(added)
            texts = (tokens[:known], tokens[known:], added)
            rows.append(Sentence(*(self.vocabulary.decode(text) for text in texts)))
        data = (
            f"{len(rows)} of {len(dataset)} validation windows; the most probable token each time"
        )
        return (Sentences(title="Continuations", data=data, rows=tuple(rows)),)

    def state_dict(self) -> dict[str, str]:
        """Which vocabulary the figures of this run are about."""
        return {"vocabulary": self._vocabulary_digest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointMismatchError where this process has another vocabulary."""
        if state["vocabulary"] != self._vocabulary_digest():
            raise CheckpointMismatchError(
                f"the checkpoint's vocabulary has digest {state['vocabulary']}, that of the text "
                f"here {self._vocabulary_digest()}; take the text that it was trained on"
            )

    def export_parts(self) -> Mapping[str, Part]:
        """What reads a prompt, and what adds a token to it."""
        return parts(self.plain_model, self._prefill_probes())

    def assemble(self, runs: Mapping[str, Runner], batch: Batch) -> Mapping[str, Tensor]:
        """What the parts write, token by token."""
        return self._continued(runs, batch)

    def export_files(self) -> Mapping[str, bytes]:
        """The vocabulary, and a program that continues a text with ONNX Runtime and NumPy alone."""
        return {
            VOCABULARY: self.vocabulary.serialized,
            PROGRAM: inspect.getsource(continuing).encode(),
        }

    def export_spec(self) -> ExportSpec:
        """Names of what goes in and comes out."""
        rows = torch.arange(self._settings.context + 1).repeat(2, 1) % self.vocabulary.size
        return ExportSpec(
            input_names=("tokens", "next_tokens"),
            output_names=("nll",),
            description=(
                f"What each next token of a text costs in nats, given those before it. Tokens are "
                f"those of `{VOCABULARY}`, which is also the weights' tensor 'vocabulary'. To "
                f"continue a text, run `parts/prefill` once and `parts/decode_step` for each "
                f"token, as `{PROGRAM}` does: `python {PROGRAM} prompt.txt`."
            ),
            probes={"ascending": (rows[:, :-1].contiguous(), rows[:, 1:].contiguous())},
            task="text-generation",
        )

    def _continued(self, runs: Mapping[str, Runner], batch: Batch) -> dict[str, Tensor]:
        (tokens, _), is_continued = batch
        num_known = tokens.shape[1] // 2
        added = tokens.new_zeros(len(tokens), tokens.shape[1] - num_known)
        if bool(is_continued.any()):
            added[is_continued] = continuation(runs, tokens[is_continued], num_known)
        return {"continuation": added, "is_continued": is_continued}

    def _prefill_probes(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Prompts of one token, and of as many as there may be; two texts of each."""
        context = self._settings.context
        tokens = torch.arange(context).repeat(2, 1) % self.vocabulary.size
        return {
            "shortest": (tokens, torch.tensor([1, 1])),
            "longest": (tokens, torch.tensor([context, context])),
        }

    @cached_property
    def _num_bytes(self) -> Tensor:
        return torch.tensor([len(symbol) for symbol in self.vocabulary.bytes_of])

    def _vocabulary_digest(self) -> str:
        return hashlib.sha256(self.vocabulary.serialized).hexdigest()

    def _require_vocabulary_of(self, model: nn.Module) -> None:
        """Raise CheckpointMismatchError for weights that were trained on other symbols."""
        buffer = getattr(model, "vocabulary", None)
        if isinstance(buffer, Tensor) and bytes(buffer.tolist()) != self.vocabulary.serialized:
            found = hashlib.sha256(bytes(buffer.tolist())).hexdigest()
            raise CheckpointMismatchError(
                f"the weights belong to a vocabulary of digest {found[:12]}…, the text here has "
                f"{self._vocabulary_digest()[:12]}…: their numbers stand for other symbols. Take "
                f"the text that the weights were trained on, or experiment.base of "
                f"language_model_lora, which brings its vocabulary along"
            )
