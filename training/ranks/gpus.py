"""Which GPU each process of a machine has: one of its own, the only one that it sees.

So the first GPU is each process's own, whatever computes there and in whichever thread, and a
checkpoint knows of one, however many a machine has. NCCL reaches those that are not seen.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from holdfast.training.errors import ConfigError
from holdfast.training.exactness.reproducibility import child_environment

VISIBLE = "CUDA_VISIBLE_DEVICES"


def environments_of_ranks(
    num_here: int, num_threads: int, device: Literal["auto", "cpu", "cuda"]
) -> list[dict[str, str]]:
    """What each rank on this machine is started with. Raises ConfigError where GPUs are too few."""
    gpus = _gpus_of_ranks(num_here, device)
    own = [{VISIBLE: gpu} for gpu in gpus] if gpus else [{}] * num_here
    return [{**child_environment(num_threads), **seen} for seen in own]


def _gpus_of_ranks(num_here: int, device: Literal["auto", "cpu", "cuda"]) -> list[str]:
    """The GPU of each, as the variable names it; none where they train on CPUs."""
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if num_gpus == 0:
        return []
    if num_gpus < num_here:
        raise ConfigError(
            f"distributed.num_processes={num_here}: each process needs a GPU of its own, and this "
            f"machine has {num_gpus}; write distributed.num_processes={num_gpus}, or "
            f"train.device=cpu"
        )
    visible = os.environ.get(VISIBLE)
    names = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
    return [name.strip() for name in names[:num_here]]
