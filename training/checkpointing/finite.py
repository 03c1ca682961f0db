"""What is not finite among many tensors: one pass over each, one wait for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity here, in their order.

    Reading the least and the largest value takes a third of the time of a copy: NaN is passed on.
    """
    extremes = {
        name: torch.stack(torch.aminmax(_comparable(tensor)))
        for name, tensor in ((name, local_part(tensor)) for name, tensor in tensors.items())
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel()
    }
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, pair in extremes.items():
        groups.setdefault((pair.device, pair.dtype), []).append(name)
    bad: set[str] = set()
    for names in groups.values():
        is_good = torch.isfinite(torch.stack([extremes[name] for name in names])).all(1).tolist()
        bad |= {name for name, good in zip(names, is_good, strict=True) if not good}
    return [name for name in tensors if name in bad]


def is_slice(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process has a slice alone."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Any) -> Tensor:
    """What this process has of a tensor; its memory."""
    local: Tensor = tensor.detach().to_local() if is_slice(tensor) else tensor
    return local


def _comparable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.itemsize == 1 else tensor
