"""Beam search against brute force, and decoding with a cache against the whole network."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from holdfast.training.experiments.translation.model import ModelSize, TranslationModel
from holdfast.training.experiments.translation.search import Beam, beam_search, greedy
from holdfast.training.experiments.translation.vocabulary import BOS, EOS, PAD

NUM_SYMBOLS = 5
MAX_TOKENS = 4
SOURCES = torch.tensor([[3, 4, 3, EOS, PAD], [4, EOS, PAD, PAD, PAD], [3, 3, 3, 4, EOS]])


def small_model(seed: int, num_symbols: int = NUM_SYMBOLS, max_tokens: int = 8) -> TranslationModel:
    torch.manual_seed(seed)
    size = ModelSize(
        num_symbols=num_symbols,
        max_tokens=max_tokens,
        width=8,
        num_layers=2,
        num_heads=2,
        feedforward=16,
        dropout=0.5,
    )
    model = TranslationModel(size, b"{}").eval()
    with torch.no_grad():
        model.embedding.weight *= 3  # opinions that differ
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that are not where they begin
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return model


def hypotheses_by_score(model: TranslationModel, source: Tensor, beam: Beam) -> dict[str, float]:
    """The score of every sentence of up to MAX_TOKENS tokens, by the whole network."""
    scores = {}
    others = [symbol for symbol in range(NUM_SYMBOLS) if symbol != EOS]
    for length in range(1, MAX_TOKENS + 1):
        words = itertools.product(others, repeat=length - 1)
        tokens = torch.tensor([[BOS, *chosen, EOS] for chosen in words])
        logits = model.logits(source.expand(len(tokens), -1), tokens[:, :-1])
        costs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).sum((1, 2))
        for row, cost in zip(tokens, costs.tolist(), strict=True):
            scores[str(row[1:].tolist())] = cost / beam.weight(length)
    return scores


def as_text(row: Tensor) -> str:
    tokens = row.tolist()
    return str(tokens[: tokens.index(EOS) + 1])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_beam_that_holds_everything_finds_the_best_of_all(seed: int, penalty: float) -> None:
    model, beam = small_model(seed), Beam((NUM_SYMBOLS - 1) ** (MAX_TOKENS - 1), penalty)
    with torch.no_grad():
        found = beam_search(model, SOURCES, MAX_TOKENS, beam)
        for row, source in zip(found, SOURCES, strict=True):
            scores = hypotheses_by_score(model, source, beam)
            assert scores[as_text(row)] == pytest.approx(max(scores.values()), abs=1e-5)


def test_what_a_search_finds_does_not_depend_on_the_batch() -> None:
    model = small_model(7)
    with torch.no_grad():
        together = beam_search(model, SOURCES, MAX_TOKENS, Beam(3, 0.6))
        for number in range(len(SOURCES)):
            alone = beam_search(model, SOURCES[number : number + 1], MAX_TOKENS, Beam(3, 0.6))
            assert torch.equal(alone[0], together[number])


def test_greedy_takes_the_most_probable_token_each_time() -> None:
    model = small_model(3)
    with torch.no_grad():
        found = greedy(model, SOURCES, 8)
        for row, source in zip(found, SOURCES, strict=True):
            tokens = [BOS]
            while len(tokens) < 9 and tokens[-1] != EOS:
                tokens.append(
                    int(model.logits(source[None], torch.tensor([tokens]))[0, -1].argmax())
                )
            assert row.tolist() == tokens[1:] + [PAD] * (9 - len(tokens))


def test_steps_with_a_cache_give_the_logits_of_the_whole_network() -> None:
    model = small_model(5, num_symbols=11)
    targets = torch.randint(3, 11, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.logits(SOURCES, targets)
        memory, cache = model.encode(SOURCES), model.empty_cache(3)
        for place in range(8):
            position = torch.full((3,), place)
            logits, cache = model.step(targets[:, place], position, SOURCES, memory, cache)
            torch.testing.assert_close(logits, whole[:, place])


def test_padding_changes_nothing() -> None:
    model = small_model(2)
    wider = torch.nn.functional.pad(SOURCES, (0, 3), value=PAD)
    targets = torch.tensor([[BOS, 3, EOS, PAD], [BOS, 4, 4, EOS], [BOS, EOS, PAD, PAD]])
    with torch.no_grad():
        costs = model(SOURCES, targets)
        for one, other in zip(costs, model(wider, targets), strict=True):
            torch.testing.assert_close(one, other)
        assert torch.equal(costs[0] != 0, targets[:, 1:] != PAD)
        assert bool((model.encode(wider)[:, :, 5:] == 0).all())
        torch.testing.assert_close(model.encode(wider)[:, :, :5], model.encode(SOURCES))


def test_costs_are_those_of_cross_entropy() -> None:
    model = small_model(4)
    targets = torch.tensor([[BOS, 3, 4, EOS]]).expand(3, -1)
    with torch.no_grad():
        own, uniform = model(SOURCES, targets)
        logits = model.logits(SOURCES, targets[:, :-1])
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets[:, 1:].flatten(), label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close((0.9 * own + 0.1 * uniform).flatten(), wanted)


def test_layers_do_not_begin_as_copies_of_each_other() -> None:
    first, second = small_model(0).encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)  # type: ignore[union-attr]
