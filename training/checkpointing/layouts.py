"""How tensors lie in memory, which a file of tensors does not say.

A file holds the numbers of a tensor in their logical order. Kernels may walk memory as it lies, and
then channels_last weights with momentum that came back contiguous give other numbers. So strides
are noted where they are not the usual ones, and put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Strides = Sequence[int] | None
"""Of a dense tensor; None where it is contiguous."""


def strides_of(tensor: Tensor) -> Strides:
    """The strides of a dense tensor whose dimensions lie in the order of this one's."""
    if tensor.is_contiguous():
        return None
    dense = torch.empty_like(tensor, device="meta")
    return None if dense.is_contiguous() else dense.stride()


def unusual_strides(
    tensors: Mapping[str, Tensor], usual: Mapping[str, Strides]
) -> dict[str, list[int] | None]:
    """The strides of those tensors that lie otherwise than ``usual`` says; its default is None."""
    found = {name: strides_of(tensor) for name, tensor in tensors.items()}
    return {
        name: None if strides is None else list(strides)
        for name, strides in found.items()
        if strides != usual.get(name)
    }


def laid_out(tensor: Tensor, strides: Strides) -> Tensor:
    """The same numbers with these strides; the tensor itself where it has them."""
    if strides_of(tensor) == (None if strides is None else tuple(strides)):
        return tensor
    if strides is None:
        return tensor.contiguous()
    placed = torch.empty_strided(
        tensor.shape, tuple(strides), dtype=tensor.dtype, device=tensor.device
    )
    return placed.copy_(tensor)


def all_laid_out(
    tensors: Mapping[str, Tensor], strides: Mapping[str, Strides]
) -> dict[str, Tensor]:
    """Tensors by name, those that have strides here laid out by them."""
    return {
        name: laid_out(tensor, strides[name]) if name in strides else tensor
        for name, tensor in tensors.items()
    }
