"""Out of memory, in one line: how much was taken, and what to write to need less."""

from __future__ import annotations

import resource

import torch

from holdfast.training.errors import OutOfMemoryError

# What torch says where it has no class of its own for it: allocators of the CPU, CUDA's libraries.
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
BYTES_PER_GIB = 2**30


def tell_of_memory(error: Exception, what: str, way_out: str) -> None:
    """Raise OutOfMemoryError where an error says that memory is short, and it was not told yet.

    Args:
        error: whatever was raised.
        what: was being done, as the subject of "needs more memory".
        way_out: what to write to need less.
    """
    if not isinstance(error, OutOfMemoryError) and _is_out_of_memory(error):
        raise OutOfMemoryError(
            f"{what} needs more memory than there is ({_taken()}): {way_out}"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def _taken() -> str:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    taken = f"the peak of this process was {own / BYTES_PER_GIB:.2f} GiB"
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        peak = torch.cuda.max_memory_allocated()
        total = torch.cuda.get_device_properties().total_memory
        gpu = f"the peak on {torch.cuda.get_device_name()} was {peak / BYTES_PER_GIB:.2f}"
        return f"{gpu} of {total / BYTES_PER_GIB:.2f} GiB; {taken}"
    return taken
