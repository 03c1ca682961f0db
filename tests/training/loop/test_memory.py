from __future__ import annotations

import pytest
import torch

from holdfast.training.errors import OutOfMemoryError
from holdfast.training.loop.memory import tell_of_memory


def too_much() -> None:
    torch.empty(2**55, dtype=torch.uint8)


def of_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def of_python() -> None:
    _ = [0] * 2**60


def of_cublas() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")


@pytest.mark.parametrize("fail", [too_much, of_the_gpu, of_python, of_cublas])
def test_memory_that_is_short_is_told_with_the_peak_and_the_way_out(fail: object) -> None:
    assert callable(fail)
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        fail()
    with pytest.raises(OutOfMemoryError) as caught:
        tell_of_memory(raised.value, "a part of step 3", "write train.num_microbatches=2")
    tell_of_memory(caught.value, "step 3", "write less")  # it was told
    message = str(caught.value)
    assert message.startswith("a part of step 3 needs more memory than there is (the peak of this")
    assert message.endswith("GiB): write train.num_microbatches=2")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    tell_of_memory(error, "step 3", "less")
