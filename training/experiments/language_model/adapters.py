"""A language model that somebody trained, fine-tuned on another text by low-rank adapters.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models". The base stays frozen and out
of the checkpoints; what is exported is one model, with the adapters folded into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.training.bundles.continuing import Vocabulary
from holdfast.training.checkpointing.model_weights import load_model
from holdfast.training.errors import DataFormatError
from holdfast.training.experiments.language_model.experiment import (
    LanguageModel,
    LanguageModelSettings,
)
from holdfast.training.weights.reading import read_weights, weights_file


class AdaptersSettings(LanguageModelSettings):
    """Settings of the fine-tuning; those of the size are the base's."""

    base: Path
    """The language model that is tuned: a checkpoint, a bundle, or its safetensors file."""
    rank: int = Field(4, ge=1)
    """Rank of what is added to each matrix."""
    alpha: float = Field(8.0, gt=0)
    """What is added is scaled by alpha / rank."""


class Adapted(nn.Module):
    """A linear layer that is frozen, and a product of two thin matrices that is trained."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.normal_(self.down, std=rank**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """As the layer does, and what the adapter adds."""
        outputs: Tensor = self.base(inputs) + self.scale * (inputs @ self.down.T) @ self.up.T
        return outputs

    def folded(self) -> nn.Linear:
        """One layer with both; the adapter is spent."""
        with torch.no_grad():
            self.base.weight += self.scale * self.up @ self.down
        return self.base


class AdaptedLanguageModel(LanguageModel):
    """The same task, on a base and in its vocabulary."""

    Settings = AdaptersSettings
    defaults: ClassVar[dict[str, Any]] = {
        **LanguageModel.defaults,
        "checkpoint": {"frozen": "left_out"},
    }

    @cached_property
    def _base(self) -> Mapping[str, Tensor]:
        return read_weights(self._settings.base)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The base's. Raises DataFormatError where it has none."""
        place, found = self._settings.base, self._base.get("vocabulary")
        try:
            if found is None:
                raise ValueError("there is no tensor of that name")
            return Vocabulary.parse(bytes(found.tolist()))
        except (ValueError, TypeError) as error:
            raise DataFormatError(
                f"experiment.base = {str(place)!r} has no vocabulary ({error}): expected the "
                f"weights of a language model of ours"
            ) from error

    def model(self) -> nn.Module:
        """The base, frozen, with an adapter at each of its matrices."""
        model = self.plain_model()
        load_model(model, self._base)
        model.requires_grad_(False)
        scale = self._settings.alpha / self._settings.rank
        for parent, name, layer in _layers(model, nn.Linear):
            setattr(parent, name, Adapted(layer, self._settings.rank, scale))
        return model

    def merged(self, model: nn.Module) -> nn.Module:
        """One model without adapters."""
        for parent, name, layer in _layers(model, Adapted):
            setattr(parent, name, layer.folded())
        return model

    def base_files(self) -> Sequence[Path]:
        """What the base is read from: a file of weights, or a folder with them."""
        return [weights_file(self._settings.base)]


def _layers(model: nn.Module, kind: type[Any]) -> list[tuple[nn.Module, str, Any]]:
    """Layers of a kind, each with what holds it and its name there."""
    return [
        (parent, name, layer)
        for parent in model.modules()
        if not isinstance(parent, Adapted)
        for name, layer in parent.named_children()
        if isinstance(layer, kind)
    ]
