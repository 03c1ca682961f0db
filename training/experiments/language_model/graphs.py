"""The model as it is served: a graph that reads a prompt, and one that adds a token to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from holdfast.training.bundles.continuing import PREFILL, STEP
from holdfast.training.experiments.language_model.model import Gpt, PrefillGraph, StepGraph
from holdfast.training.export.parts import Part
from holdfast.training.export.specification import Inputs

Runner = Callable[[tuple[Tensor, ...]], list[Tensor]]


def parts(
    build: Callable[[type[Gpt]], Gpt], prefill_probes: Mapping[str, Inputs]
) -> Mapping[str, Part]:
    """Both graphs; ``build`` makes a fresh model of a class."""
    return {
        PREFILL: Part(
            lambda: build(PrefillGraph), ("tokens", "length"), ("logits", "cache"), prefill_probes
        ),
        STEP: Part(
            lambda: build(StepGraph), ("token", "position", "cache"), ("logits", "next_cache")
        ),
    }


def runs_of(model: Gpt) -> dict[str, Runner]:
    """Both graphs as the model's own methods."""

    def prefill(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return list(model.prefill(inputs[0], inputs[1]))

    def step(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return list(model.step(inputs[0], inputs[1], inputs[2]))

    return {PREFILL: prefill, STEP: step}


def continuation(runs: Mapping[str, Runner], tokens_BC: Tensor, num_known: int) -> Tensor:
    """What is added to the first ``num_known`` tokens until the context is full, [B, C - num].

    Each token is the most probable one.
    """
    num_texts, context = tokens_BC.shape
    prompt_BC = tokens_BC.clone()
    prompt_BC[:, num_known:] = 0
    length_B = torch.full((num_texts,), num_known, device=tokens_BC.device)
    logits, cache = runs[PREFILL]((prompt_BC, length_B))
    added = [logits.argmax(-1)]
    for position in range(num_known, context - 1):
        position_B = torch.full_like(length_B, position)
        logits, cache = runs[STEP]((added[-1], position_B, cache))
        added.append(logits.argmax(-1))
    return torch.stack(added, dim=1)
