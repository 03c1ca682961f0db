"""Copies of a script's models, one in each process, which are the same after each step.

Gradients are summed by torch's ``DistributedDataParallel``, in a way that resumes exactly: with
``find_unused_parameters`` it never lays its buckets out anew, as it does after a process's first
step else, and the order of additions depends on the place in a bucket.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from holdfast.training.data.fetching import Shares
from holdfast.training.distributed.rows import by_type
from holdfast.training.distributed.stopping import AgreedMonitor
from holdfast.training.distributed.world import World
from holdfast.training.errors import ExperimentError, InputError
from holdfast.training.exactness.seeding import seed_shard
from holdfast.training.experiment.error_places import with_users_place
from holdfast.training.loop.evaluation import model_device
from holdfast.training.loop.state import TrainState
from holdfast.training.ranks.gpus import VISIBLE
from holdfast.training.ranks.segment import experiment_digest, weights_digest
from holdfast.training.stage import failed_outcome

HOW: dict[str, Any] = {"find_unused_parameters": True, "forward_sync_buffers": False}
if "forward_sync_buffers" not in signature(DistributedDataParallel).parameters:
    HOW = {"find_unused_parameters": True, "broadcast_buffers": False}  # torch before 2.13


class Copy(DistributedDataParallel):
    """A model whose gradients are the means over all processes."""

    module: nn.Module


def own_module(model: Any) -> Any:
    """The model that a copy wraps; anything else as it is."""
    return model.module if isinstance(model, Copy) else model


class Copies:
    """What one process of a script does together with all others.

    Collective calls must be made by every process, in the same order: they run one script.
    """

    def __init__(self, world: World, seed: int, monitor: AgreedMonitor) -> None:
        self.world = world
        self._seed = seed
        self._monitor = monitor
        self._models: list[Copy] = []

    def of(self, model: nn.Module) -> Copy:
        """Collective. This process's copy of a model. Raises InputError where there can be none."""
        self._require_place(model_device(model))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(
                "run.parallel(model): it has no parameter that is trained; call it as it is"
            )
        with self.world.lost_ranks_found():
            copy = Copy(model, **HOW)
        self._models.append(copy)
        return copy

    def _require_place(self, device: torch.device) -> None:
        """Raise InputError where the processes' models lie where they cannot be summed."""
        seen = self.world.gathered([device.type, os.environ.get(VISIBLE)])
        if device.type == "cuda" and len({gpu for _, gpu in seen}) < self.world.size:
            raise InputError(
                f"run.parallel(model): each of {self.world.size} processes needs a GPU of its own, "
                f"and this machine has {torch.cuda.device_count()}: start fewer, or leave the "
                f"model on the CPU"
            )
        if device.type not in ("cpu", "cuda") or len({kind for kind, _ in seen}) > 1:
            raise InputError(
                f"run.parallel(model): the model lies on {device}; several processes train all on "
                f"the CPU, or each on a GPU of its own: move it there"
            )

    def shares(self, batch_size: int, num_samples: int, drop_last: bool) -> Shares:
        """Which part of each batch is this process's.

        Raises InputError where the parts of a batch are not equal: the mean of their gradients
        would not be that of the batch.
        """
        size = self.world.size
        rest = 0 if drop_last else num_samples % batch_size
        if batch_size % size:
            raise InputError(
                f"run.loader(batch_size={batch_size}): {size} processes take equal parts of each "
                f"batch; give a multiple of {size}"
            )
        if rest % size:
            raise InputError(
                f"run.loader(…): the last batch of an epoch has {rest} samples, which {size} "
                f"processes cannot take equal parts of: give drop_last=True"
            )
        return Shares(size, self.world.rank, size)

    def vote(self) -> None:
        """Collective. Before the first step: stop if any process has a notice."""
        if not self._models:
            raise InputError(
                f"{self.world.size} processes train, and no model of theirs was made by "
                f"run.parallel(model), so that each would train alone: call the model that it "
                f"returns"
            )
        self._monitor.vote()

    def begin_step(self, step: int) -> None:
        """Each process draws for itself within a step, by (seed, step, rank)."""
        self.world.beat()
        seed_shard(self._seed, "shard", step, self.world.rank)

    @torch.no_grad()
    def end_step(self, step: int, logged: dict[str, Any], *, is_over: bool) -> dict[str, Any]:
        """Collective. What was logged, with the mean loss of all; from here all draw the same.

        Buffers are those of rank 0, and a notice that any process has is agreed upon.
        """
        for copy in self._models:
            self._take_buffers(copy)
        rank, size = self.world.rank, self.world.size
        values = torch.zeros(3 + size, dtype=torch.float64)
        loss = logged.get("loss")
        values[0], values[1], values[2] = self._monitor.has_own(), is_over, loss is not None
        values[3 + rank] = 0.0 if loss is None else torch.as_tensor(loss).detach().double()
        has_notice, num_over, num_losses, *losses = self.world.sum_of(values).tolist()
        for told, number in (("run.finish()", num_over), ("run.log(loss=…)", num_losses)):
            if 0 < number < size:
                raise ExperimentError(
                    f"{told} was called by {number:.0f} of {size} processes in step {step}: they "
                    f"must do the same steps; decide by what run.validated returns, or by the step"
                )
        if has_notice:
            self._monitor.agree()
        seed_shard(self._seed, "after step", step)
        self.world.beat()
        return logged if loss is None else {**logged, "loss": _mean(losses)}

    def metrics(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Collective. Means over the processes; one that all have found is taken as it is."""
        found = self.world.gathered(dict(measured))
        for rank, theirs in enumerate(found):
            if theirs.keys() != measured.keys():
                raise ExperimentError(
                    f"run.validated(…): rank {rank} has {sorted(theirs)}, and rank "
                    f"{self.world.rank} has {sorted(measured)}; all must measure the same"
                )
        return {name: _mean([theirs[name] for theirs in found]) for name in measured}

    def require_same(self, state: TrainState) -> None:
        """Collective. Raises ExperimentError where processes do not keep the same."""
        for what, digest in (
            ("weights", weights_digest(state)),
            ("values", experiment_digest(state)),
        ):
            others = [r for r, found in enumerate(self.world.gathered(digest)) if found != digest]
            if others:
                raise ExperimentError(
                    f"ranks {', '.join(map(str, others))} have other {what} than rank "
                    f"{self.world.rank}: call the model that run.parallel returned, and keep "
                    f"nothing that depends on the samples of one process, or on time"
                )

    def tell_end(self, error: BaseException) -> None:
        """Let the others, and whoever has started this process, know why it ends."""
        self.world.tell_error(error)
        outcome = failed_outcome(error).as_json()
        outcome["error"]["message"] = with_users_place(error)
        assert self.world.seat is not None
        self.world.seat.outcome_file.write_text(json.dumps(outcome))

    def cause(self, error: BaseException) -> BaseException:
        """What has ended this process: that another one has, where torch says so by ``error``."""
        return self.world.lost_by(error) or error

    def _take_buffers(self, copy: Copy) -> None:
        buffers = {name: buffer for name, buffer in copy.module.named_buffers() if buffer.numel()}
        for group in by_type(buffers).values():
            flat = torch.cat([buffer.reshape(-1) for buffer in group.values()])
            self.world.copy_from_first(flat)
            parts = torch.split(flat, [buffer.numel() for buffer in group.values()])
            for buffer, part in zip(group.values(), parts, strict=True):
                buffer.copy_(part.view_as(buffer))


def _mean(values: list[float]) -> float:
    """In the order of the ranks; of equal ones exactly that one."""
    if all(value == values[0] for value in values):
        return values[0]
    return sum(values) / len(values)
