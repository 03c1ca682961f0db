"""Sums of gradients in slices over the shards of a step, in the one tree over their numbers.

The ranks go through the shards together: in pass k rank r does shard k * W + r, for W ranks, a
power of two. So what the ranks sum at the end of each backward pass is a whole subtree, and the
passes of a rank are the leaves of the rest, which each rank adds up for its slices alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from holdfast.training.checkpointing.finite import local_part
from holdfast.training.distributed.gradient_tree import TreeCounter, tree_sum
from holdfast.training.distributed.world import World

Gradients = dict[nn.Parameter, Tensor]


class TreeScatter(ReduceScatter):
    """In the place of torch's own sum at the end of a backward pass: each rank sums its slices."""

    def __init__(self, world: World) -> None:
        self._world = world

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory for what is summed."""
        return torch.empty([*size], dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,  # noqa: ARG002  # there is one
        op: Any,  # noqa: ARG002  # always the sum
        async_op: bool = False,  # noqa: ARG002  # torch's own signature
    ) -> None:
        """Collective. Leave this rank's slice of the sum in ``output_tensor``."""
        size, width = self._world.size, output_tensor.numel()
        taken, wait = self._world.begin_exchange(input_tensor, [width] * size, [width] * size)
        wait()
        parts = {(0, rank): part for rank, part in enumerate(taken.view(size, width).unbind())}
        output_tensor.copy_(tree_sum(parts, size, lambda left, right: left.add_(right)))


class PassSums:
    """What the passes of a step have left in the gradients, added up in the tree."""

    def __init__(self, parameters: Iterable[nn.Parameter], num_passes: int) -> None:
        self._parameters = [*parameters]
        self._sums = TreeCounter[Gradients](num_passes, _added)

    def take(self, number: int) -> None:
        """Put the gradients of a pass away: the next one's begin anew."""
        taken: Gradients = {}
        for parameter in self._parameters:
            if parameter.grad is not None:
                taken[parameter] = parameter.grad
                parameter.grad = None
        self._sums.take(number, taken)

    def put(self) -> None:
        """Leave the gradients of the whole step in the parameters."""
        [total] = self._sums.parts().values()
        for parameter, gradient in total.items():
            parameter.grad = gradient


@torch.no_grad()
def _added(left: Gradients, right: Gradients) -> Gradients:
    if left:
        torch._foreach_add_([*map(local_part, left.values())], [*map(local_part, right.values())])
    return left
