"""The translation model as it is served: a graph that encodes, and one that decodes one token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.training.experiments.translation.model import (
    EncoderGraph,
    ModelSize,
    StepGraph,
    TranslationModel,
)
from holdfast.training.export.parts import Part
from holdfast.training.export.specification import Inputs

Runner = Callable[[tuple[Tensor, ...]], list[Tensor]]
ENCODER, STEP = "encoder", "decoder_step"


@dataclass(frozen=True)
class GraphTranslator:
    """Two graphs in any runtime, as what a search decodes with."""

    encoder: Runner
    decoder_step: Runner
    size: ModelSize

    def encode(self, source: Tensor) -> Tensor:
        """See ``TranslationModel.encode``."""
        return self.encoder((source,))[0]

    def empty_cache(self, num_sentences: int) -> Tensor:
        """See ``TranslationModel.empty_cache``."""
        return torch.zeros(self.size.cache_shape(num_sentences))

    def step(
        self, token: Tensor, position: Tensor, source: Tensor, memory: Tensor, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``TranslationModel.step``."""
        logits, cache = self.decoder_step((token, position, source, memory, cache))
        return logits, cache


def translation_parts(
    build: Callable[[type[TranslationModel]], TranslationModel],
    encoder_probes: Mapping[str, Inputs],
) -> Mapping[str, Part]:
    """Both graphs; ``build`` makes a fresh model of a class."""
    return {
        ENCODER: Part(lambda: build(EncoderGraph), ("source",), ("memory",), encoder_probes),
        STEP: Part(
            lambda: build(StepGraph),
            ("token", "position", "source", "memory", "cache"),
            ("logits", "next_cache"),
        ),
    }
