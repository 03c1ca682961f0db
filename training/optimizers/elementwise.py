"""Whether an optimizer gives an element the same bits in whatever slice of a tensor it lies.

With ``num_shards`` another number of ranks has other slices of the weights. So an update must look
at no other element (a norm, a product of matrices), nor depend on where in memory an element lies:
kernels round what does not fill a vector of the processor otherwise than the rest. Whether that is
so is tried, on small tensors that are whole, and in rows.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.errors import ExperimentError

CUTS = (((64, 15), 64), ((33, 5), 4), ((129,), 8))
"""Shapes, and numbers of slices. The first fills vectors as a whole, and in slices none."""
NUM_STEPS = 12
RATE = 0.01


def require_elementwise(optimizers: Iterable[Optimizer]) -> None:
    """Raise ExperimentError for an optimizer whose bits depend on how tensors are cut into rows."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for dtype in {parameter.dtype for parameter in group["params"]}:
                if why := _why_not(optimizer, group, dtype):
                    raise ExperimentError(
                        f"{type(optimizer).__name__} {why}, so the bits would depend on the number "
                        f"of processes: with distributed.strategy=fsdp and num_shards use fp32 "
                        f"weights and an optimizer that takes each element by itself, such as "
                        f"AdamW, not fused; or leave num_shards out"
                    )


def _why_not(optimizer: Optimizer, group: dict[str, Any], dtype: torch.dtype) -> str | None:
    if dtype.itemsize < torch.float32.itemsize:  # each kernel rounds them as it likes
        return f"updates {dtype} weights"
    try:
        for shape, num in CUTS:
            whole, cut = (_updated(optimizer, group, dtype, shape, n) for n in (1, num))
            if not torch.equal(whole, cut):
                return f"updates {dtype} weights in slices otherwise than whole ones"
    except Exception as error:  # noqa: BLE001  # somebody's own code may raise anything
        return f"cannot be tried on small tensors ({error!r:.200})"
    return None


def _updated(
    optimizer: Optimizer,
    group: dict[str, Any],
    dtype: torch.dtype,
    shape: Sequence[int],
    num_slices: int,
) -> Tensor:
    """What an optimizer of this kind makes of weights that lie in so many slices."""
    draws = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> Sequence[Tensor]:
        return (torch.randn(shape, generator=draws) * scale).to(dtype).chunk(num_slices)

    parameters = [nn.Parameter(part.clone()) for part in drawn(1.0)]
    tried = copy.copy(optimizer)  # torch copies no hooks, and what is its own is given anew
    tried.state = defaultdict(dict)
    tried.param_groups = [{**group, "params": parameters, "lr": RATE}]
    for step in range(NUM_STEPS):
        for parameter, gradient in zip(parameters, drawn(10.0 ** (step % 4 - 2)), strict=True):
            parameter.grad = gradient.clone()
        tried.step()
    return torch.cat([parameter.detach() for parameter in parameters])
