"""Rows whose sums may begin during the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.training.distributed.early_rows import EarlyRows
from holdfast.training.errors import ExperimentError


class Chain(nn.Module):
    """Three layers; the last has a row of its own, and the others one together."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.is_reentrant = False
        self.told: list[tuple[int, list[bool]]] = []
        first, second, last = ({f"{n}": p for n, p in x.named_parameters()} for x in self.layers)
        named = {f"{key} of {i}": p for i, x in enumerate((first, second)) for key, p in x.items()}
        self.early = EarlyRows([last, named], self.tell)

    def tell(self, row: int) -> None:
        self.told.append((row, [layer.weight.grad is not None for layer in self.layers]))

    def backward(self, num_used: int = 3) -> list[tuple[int, list[bool]]]:
        self.told.clear()
        self.zero_grad()
        x = torch.ones(1, 2, requires_grad=True)
        for layer in self.layers[3 - num_used :]:
            x = layer(x)
        if self.is_reentrant:
            last = self.layers[2]
            x = checkpoint(last, x, use_reentrant=True) + checkpoint(last, x, use_reentrant=True)
        with self.early.watching():
            x.sum().backward()
        return [*self.told]


def test_the_first_pass_is_only_watched_and_then_rows_are_told_when_they_are_complete() -> None:
    chain = Chain()
    assert chain.backward() == []
    expected = [(0, [False, False, True]), (1, [True, True, True])]
    assert chain.backward() == expected
    assert chain.backward() == expected


def test_a_row_with_a_layer_that_was_not_used_is_not_told_and_none_after_it() -> None:
    chain = Chain()
    chain.backward()
    assert chain.backward(num_used=2) == [(0, [False, False, True])]
    assert [row for row, _ in chain.backward()] == [0, 1]


def test_no_backward_pass_but_the_watched_one_tells_anything() -> None:
    chain = Chain()
    chain.backward()
    chain.told.clear()
    chain.layers[2](torch.ones(1, 2)).sum().backward()
    assert chain.told == []


def test_where_gradients_come_in_parts_nothing_is_told_early() -> None:
    chain = Chain()
    chain.is_reentrant = True
    chain.backward()
    assert chain.backward() == []


def test_gradients_that_come_in_parts_all_at_once_are_refused_by_name() -> None:
    chain = Chain()
    chain.backward()
    chain.is_reentrant = True
    with pytest.raises(ExperimentError, match=r"the gradient of (weight|bias) came twice .*False"):
        chain.backward()


def test_removed_hooks_see_nothing() -> None:
    chain = Chain()
    chain.early.remove()
    chain.backward()
    assert chain.backward() == []


def test_the_gradient_is_whole_when_a_row_is_told() -> None:
    weight = nn.Parameter(torch.ones(3))
    seen: list[Tensor] = []

    def tell(_: int) -> None:
        assert weight.grad is not None
        seen.append(weight.grad.clone())

    early = EarlyRows([{"weight": weight}], tell)
    for _ in range(2):
        weight.grad = None
        with early.watching():  # a tied weight: used twice, and its gradient comes once
            (weight * 2 + weight * 3).sum().backward()
    assert torch.equal(seen[0], torch.full((3,), 5.0))
