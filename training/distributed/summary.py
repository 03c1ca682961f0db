"""What is small of a step, in one vector for all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.training.distributed.buffers import Buffers, is_counter
from holdfast.training.distributed.gradient_tree import TreeCounter, tree_sum
from holdfast.training.distributed.rows import Memory


@dataclass(frozen=True)
class Done:
    """What a rank's own shards of a step gave.

    Attributes:
        num_shards: of the step.
        losses: by shard.
        used: names of parameters that have a gradient.
        counters: for each row, the sums so far.
        integers: buffers of integers, as shard 0 left them; without it, none.
    """

    num_shards: int
    losses: dict[int, Tensor]
    used: set[str]
    counters: list[TreeCounter[Memory]]
    integers: dict[str, Tensor]


HALF = 2**20  # a whole number travels in two parts, each of which fp32 holds


class Summary:
    """Packs and unpacks a vector that is summed over the ranks.

    The sums are exact, in fp32, too: of each place one rank alone holds a number, or only whether
    it is zero is asked.
    """

    def __init__(self, parameters: Mapping[str, Tensor], buffers: Buffers, num_shards: int) -> None:
        """``num_shards`` are the most that a step has."""
        now = buffers.now()
        self._parameters = list(parameters)
        self._buffers = list(now)
        self._integers = {name: b.numel() for name, b in now.items() if is_counter(b)}
        bounds = [1, num_shards, len(self._parameters), len(self._buffers)]
        self._sizes = [*bounds, 2 * sum(self._integers.values())]
        self.size = sum(self._sizes)

    def packed(self, done: Done, has_notice: bool, changed: set[str]) -> Tensor:
        """The vector of this rank."""
        losses = [0.0] * self._sizes[1]
        for shard, loss in done.losses.items():
            losses[shard] = loss.item()
        values = [float(has_notice), *losses]
        values += [float(name in done.used) for name in self._parameters]
        values += [float(name in changed) for name in self._buffers]
        for name, size in self._integers.items():
            found = done.integers.get(name)
            numbers = [0] * size if found is None else found.flatten().tolist()
            values += [float(part) for number in numbers for part in divmod(int(number), HALF)]
        return torch.tensor(values, dtype=torch.float64)

    def has_notice(self, values: Tensor) -> bool:
        """Whether any rank has one."""
        return bool(values[0] > 0)

    def loss(self, values: Tensor, done: Done) -> Tensor:
        """The step's loss: its shards' summed as gradients are."""
        own = next(iter(done.losses.values()), None)
        dtype = torch.get_default_dtype() if own is None else own.dtype
        losses = values[1 : 1 + done.num_shards].to(dtype)
        total = tree_sum({(0, n): loss for n, loss in enumerate(losses)}, len(losses), torch.add)
        result: Tensor = total.clone()
        return result if own is None else result.to(own.device)

    def used(self, values: Tensor) -> set[str]:
        """Names of parameters that have a gradient in any shard."""
        return self._named(self._parameters, self._split(values)[2])

    def used_by_some(self, values: Tensor, num_ranks: int) -> set[str]:
        """Names of parameters that have a gradient on some ranks alone."""
        flags = self._split(values)[2]
        return self._named(self._parameters, flags * (flags < num_ranks))

    def changed(self, values: Tensor) -> set[str]:
        """Names of buffers that any shard has changed."""
        return self._named(self._buffers, self._split(values)[3])

    def integers(self, values: Tensor) -> dict[str, Tensor]:
        """Buffers of integers, as shard 0 left them."""
        halves = self._split(values)[4].view(-1, 2).long()
        numbers = halves[:, 0] * HALF + halves[:, 1]
        parts = torch.split(numbers, [*self._integers.values()])
        return dict(zip(self._integers, parts, strict=True))

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split(values, self._sizes)

    @staticmethod
    def _named(names: list[str], flags: Tensor) -> set[str]:
        return {name for name, flag in zip(names, flags.tolist(), strict=True) if flag > 0}
