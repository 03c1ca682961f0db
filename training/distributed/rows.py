"""Tensors of one type in a row, so that they are summed at one stroke."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EARLY_BYTES = 4 * 2**20
"""Gradients of so many bytes are a row whose sum begins during the backward pass."""


@dataclass(frozen=True)
class Memory:
    """One row: all its elements, and the tensors that lie in it, by name.

    ``extra`` is the place behind them, for what travels along; zero where nothing was put there.
    """

    flat: Tensor
    tensors: dict[str, Tensor]
    extra: Tensor


class Row:
    """What is summed of tensors of one type, and memory for it that is used again.

    Attributes:
        size: elements of a row; a multiple of the number of slices.
        has_extra: whether something travels along.
    """

    def __init__(self, tensors: Mapping[str, Tensor], num_slices: int, num_extra: int) -> None:
        self._places: dict[str, tuple[torch.Size, tuple[int, ...], int]] = {}
        self._num = 0
        for name, tensor in tensors.items():
            strides = torch.empty_like(tensor, device="meta").stride()  # dense in any case
            self._places[name] = (tensor.shape, strides, self._num)
            self._num += tensor.numel()
        self._num_extra = num_extra
        self.has_extra = num_extra > 0
        self.size = -(-(self._num + num_extra) // num_slices) * num_slices
        self._like = next(iter(tensors.values()))
        self._free: list[Memory] = []

    @property
    def names(self) -> list[str]:
        """Of the tensors, in their order."""
        return [*self._places]

    @property
    def dtype(self) -> torch.dtype:
        """The type of all tensors."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where a row lies."""
        return self._like.device

    def take(self) -> Memory:
        """Memory for one row: what is extra is zero, all else is to be written."""
        if self._free:
            memory = self._free.pop()
            memory.extra.zero_()
            return memory
        flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        tensors = {name: flat.as_strided(*place) for name, place in self._places.items()}
        return Memory(flat, tensors, flat[self._num : self._num + self._num_extra])

    def give_back(self, memory: Memory) -> None:
        """Memory that is not needed any more."""
        self._free.append(memory)

    def add(self, left: Memory, right: Memory) -> Memory:
        """The sum, in the left operand's place; the right one's memory is free again."""
        left.flat.add_(right.flat)
        self.give_back(right)
        return left


def early_groups(gradients: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """What is summed while the backward pass goes on: from the last layers to the first.

    The first layers' gradients, which come when it ends, are in none of the groups.
    """
    waiting: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, tensor in reversed([*gradients.items()]):
        group = waiting.setdefault(tensor.dtype, {})
        group[name] = tensor
        if sum(t.numel() * t.itemsize for t in group.values()) >= EARLY_BYTES:
            yield waiting.pop(tensor.dtype)


def by_type(tensors: Mapping[str, Tensor]) -> dict[torch.dtype, dict[str, Tensor]]:
    """Tensors by their type."""
    groups: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(tensor.dtype, {})[name] = tensor
    return groups
