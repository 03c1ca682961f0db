from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdfast.training.checkpointing.model_weights import laid_out, strides_of, unusual_strides

TENSORS = {
    "contiguous": torch.randn(2, 3),
    "scalar": torch.tensor(1.0),
    "empty": torch.empty(0, 3),
    "transposed": torch.randn(4, 3).t(),
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "both": torch.randn(2, 3, 1, 1).to(memory_format=torch.channels_last),
    "permuted": torch.randn(2, 3, 4, dtype=torch.float64).permute(2, 0, 1),
    "slice": torch.randn(6, 6)[::2, 1:4],
    "expanded": torch.randn(1, 3).expand(4, 3),
    "complex": torch.randn(3, 2, dtype=torch.complex64).t(),
    "bool": (torch.randn(3, 2) > 0).t(),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_a_copy_from_a_file_is_laid_out_as_the_tensor_was(tensor: Tensor) -> None:
    [strides] = unusual_strides({"x": tensor}, {}).values() or [None]
    found = laid_out(tensor.clone(memory_format=torch.contiguous_format), strides)
    assert torch.equal(found, tensor)
    assert found.dtype == tensor.dtype
    assert strides_of(found) == strides_of(tensor)
    dense = torch.empty_like(tensor)
    assert found.stride() == dense.stride() or min(tensor.shape, default=1) <= 1


def test_what_lies_as_usual_is_not_noted() -> None:
    usual = {name: strides_of(tensor) for name, tensor in TENSORS.items()}
    assert unusual_strides(TENSORS, usual) == {}
    assert unusual_strides({"x": TENSORS["contiguous"]}, {"x": (1, 2)}) == {"x": None}
