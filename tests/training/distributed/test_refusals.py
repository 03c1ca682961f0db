"""Models and optimizers that belong to another kind of training, the real ones of torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from holdfast.training.distributed.refusals import refuse_wrappers
from holdfast.training.errors import ExperimentError


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    store = FileStore(os.fspath(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


def spread() -> nn.Module:
    """As ``parallelize_module`` leaves a layer."""
    spread = model()
    mesh = init_device_mesh("cpu", (1,))
    spread[0].weight = nn.Parameter(distribute_tensor(spread[0].weight, mesh))
    return spread


class DeepSpeedEngine(nn.Module):
    """Called as DeepSpeed's, which needs a compiler to be installed."""


def fsdp1() -> nn.Module:
    return FullyShardedDataParallel(model(), device_id=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: nn.DataParallel(model()), "DataParallel is not .*distributed.strategy=ddp"),
        (lambda: DistributedDataParallel(model()), "DistributedDataParallel is .*strategy=ddp"),
        (fsdp1, "FullyShardedDataParallel is not .*return the module.*strategy=fsdp"),
        (lambda: fully_shard(model()), "FSDPModule is not .*strategy=fsdp"),
        (lambda: nn.Sequential(DeepSpeedEngine()), "DeepSpeedEngine is not .*pickles"),
        (spread, "0.weight is a DTensor, and an experiment gives whole tensors"),
    ],
)
def test_models_of_other_kinds_of_training_are_refused_in_one_line(
    group: None, make: Callable[[], Any], told: str
) -> None:
    with pytest.raises(ExperimentError, match=told) as raised:
        refuse_wrappers(make())
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's import
def test_an_optimizer_whose_state_lies_in_several_processes_is_refused(group: None) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    optimizer = ZeroRedundancyOptimizer(model().parameters(), AdamW)
    with pytest.raises(ExperimentError, match=r"ZeroRedundancyOptimizer is not .*name the optim"):
        refuse_wrappers(model(), [optimizer])


def test_bare_ones_are_taken() -> None:
    optimizer: Optimizer = SGD(model().parameters(), lr=0.1)
    refuse_wrappers(model(), [optimizer])
