"""The norm of all gradients, with the same bits on any number of ranks that each keep some rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from holdfast.training.checkpointing.finite import local_part
from holdfast.training.distributed.world import World

if TYPE_CHECKING:  # it takes a moment to import, and few need it
    from holdfast.training.distributed.spreading import Spread


class RowNorm:
    """Sums squares row by row, puts the rows of all ranks in one vector, and sums that."""

    def __init__(self, world: World, spread: Spread | None) -> None:
        self._world = world
        self._spread = spread

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Collective. Scale the gradients down to a norm of at most ``max_norm``.

        Returns the norm before. As torch's ``clip_grad_norm_``, but for the order of the sum.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        local = [local_part(gradient) for gradient in gradients]
        lengths = [gradient.shape[0] if gradient.dim() else 1 for gradient in gradients]
        device = local[0].device if local else None
        squares = torch.zeros(sum(lengths), dtype=torch.float64, device=device)
        rows = torch.split(squares, lengths)
        for gradient, own, place in zip(gradients, local, rows, strict=True):
            found = squares_of_rows(own)
            first = self._first_row(gradient)
            place[first : first + len(found)] = found
        norm = self._world.sum_of(squares).sum().sqrt()
        if local:
            torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0).item())
        return norm

    def _first_row(self, gradient: Tensor) -> int:
        return 0 if self._spread is None else self._spread.region_of(gradient).offsets[0]


def squares_of_rows(tensor: Tensor) -> Tensor:
    """The sum of squares of each row, fp64; it depends on that row alone."""
    length = math.prod(tensor.shape[1:])
    flat = tensor.double().reshape(tensor.shape[0] if tensor.dim() else 1, length)
    if len(flat) == 1:  # torch may cut the sum of a single row up for its threads
        return torch.cat([flat, flat]).square().sum(1)[:1]
    return flat.square().sum(1)
