"""What others wrap models and optimizers in, and what there is instead."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from holdfast.training.errors import ExperimentError

BARE = "return the module that it wraps"
SLICES = f"{BARE}, and write distributed.strategy=fsdp"
REFUSED = {
    "DataParallel": f"{BARE}, and write distributed.strategy=ddp",
    "DistributedDataParallel": f"{BARE}, and write distributed.strategy=ddp",
    "FullyShardedDataParallel": SLICES,
    "FSDPModule": SLICES,
    "DeepSpeedEngine": f"it steps by itself, and its checkpoints are pickles; {BARE}",
    "ZeroRedundancyOptimizer": "its state lies in several processes; name the optimizer itself",
}


def refuse_wrappers(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
    """Raise ExperimentError where a model, or an optimizer, belongs to another kind of training."""
    for found in (*model.modules(), *optimizers):
        for kind in type(found).__mro__:
            if kind.__name__ in REFUSED:
                raise ExperimentError(
                    f"{kind.__name__} is not for an experiment: {REFUSED[kind.__name__]}"
                )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):
            raise ExperimentError(
                f"{name} is a DTensor, and an experiment gives whole tensors: write "
                f"distributed.strategy=fsdp for slices; tensor parallelism is not there"
            )
