"""Steps per second of several processes, beside a loop with torch's own DDP or FSDP2.

All loops live in the same processes and take turns. Each fetches its part of a step, computes,
sums the gradients, updates the weights and one moving average, on one thread a process. Two shards
a process cost two smaller passes; so there is also a plain loop that does two.

    python benchmarks/several_processes.py [--strategy ddp|fsdp] [--experiment NAME]
        [--processes N] [--set KEY=VALUE]...
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from interleaving import interleaved, markdown_table, median_ratio
from ranks import train_together
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from holdfast.training.checkpointing.finite import local_part
from holdfast.training.distributed.spreading import parts_of
from holdfast.training.distributed.world import World
from holdfast.training.loop.evaluation import move
from holdfast.training.loop.segment import build_trainer
from holdfast.training.optimizers.building import build_optimizers
from holdfast.training.runs.costs import Costs
from holdfast.training.stage import Stage, StageArguments, prepared_stage

PLAIN = {"ddp": "torch's DDP", "fsdp": "torch's FSDP2"}
NEEDED = {"ddp": (), "fsdp": ("data.should_drop_last=true",)}
OWN = "without num_shards"


def wrapped(model: nn.Module, strategy: str) -> Any:
    """The model as torch's own loops have it."""
    if strategy == "ddp":
        return DistributedDataParallel(model)
    for part in parts_of(model):
        fully_shard(part)
    return fully_shard(model)


def batches(num_samples: int, size: int, *, has_last: bool) -> Iterator[torch.Tensor]:
    """Positions of the samples of each step, without end; with what is left of an epoch or not."""
    while True:
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))
        yield from (batch for batch in order.split(size) if has_last or len(batch) == size)


def plain_loop(stage: Stage, num_steps: int, num_passes: int = 1) -> Callable[[], None]:
    """What one would write by hand."""
    config, experiment, world = stage.config, stage.experiment, stage.world
    assert world is not None
    dataset = experiment.dataset("train")
    model = experiment.model().train()
    strategy = config.distributed.strategy
    whole = wrapped(model, strategy)
    optimizers = [*build_optimizers(experiment, config.optimizer, model).values()]
    fetch = getattr(dataset, "fetch")  # noqa: B009  # optional in the protocol
    state = map(local_part, model.state_dict().values())
    live = [tensor for tensor in state if tensor.is_floating_point()]
    averages = [tensor.clone() for tensor in live]

    stream = batches(len(dataset), config.data.batch_size, has_last=strategy == "ddp")

    def one_pass(part: torch.Tensor, *, is_last: bool) -> None:
        if strategy == "fsdp":
            whole.set_requires_gradient_sync(is_last)
        batch = move(fetch(part.tolist()), torch.device("cpu"))
        with nullcontext() if is_last or strategy == "fsdp" else whole.no_sync():
            loss = experiment.loss(whole, batch) / num_passes
            loss.backward()  # type: ignore[no-untyped-call]

    def run() -> None:
        for _ in range(num_steps):
            own = next(stream)[world.rank :: world.size]
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            for number, part in enumerate(own.chunk(num_passes), 1):
                one_pass(part, is_last=number == num_passes)
            if config.train.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, live, 0.001)

    return run


def own_loop(stage: Stage, num_steps: int) -> Callable[[], None]:
    """The trainer's steps."""
    trainer = build_trainer(stage, Costs())
    steps = trainer.steps()

    def run() -> None:
        for _ in range(num_steps):
            assert not stage.should_stop()
            trainer.train_step(next(steps))

    return run


def rank(arguments: argparse.Namespace, world: World) -> None:
    """Time the loops as one of the processes; rank 0 prints the table."""
    size, plain = world.size, PLAIN[arguments.strategy]
    in_two = f"{plain} in 2 passes"
    shards = {OWN: None, f"num_shards={size}": size, f"num_shards={2 * size}": 2 * size}
    with ExitStack() as stack:
        cases: dict[str, Callable[[], None]] = {}
        for name, num_shards in shards.items():
            stage = stack.enter_context(
                prepared_stage(_stage_arguments(arguments, stack, num_shards), world=world)
            )
            if not cases:
                cases[plain] = plain_loop(stage, arguments.steps)
                cases[in_two] = plain_loop(stage, arguments.steps, 2)
            cases[name] = own_loop(stage, arguments.steps)
        seconds = interleaved(cases, arguments.repetitions)
    if world.rank == 0:
        rows = [
            [
                name,
                f"{arguments.steps / median(times):.1f}",
                f"{median_ratio(seconds[plain], times):.3f}",
                f"{median_ratio(seconds[in_two], times):.3f}",
            ]
            for name, times in seconds.items()
        ]
        title = f"{arguments.experiment}, {size} processes"
        print(markdown_table([title, "steps/s", f"to {plain}", "in 2 passes"], rows))


def _stage_arguments(
    arguments: argparse.Namespace, stack: ExitStack, num_shards: int | None
) -> StageArguments:
    overrides = [*arguments.overrides, f"distributed.strategy={arguments.strategy}"]
    overrides += NEEDED[arguments.strategy]
    overrides.append(f"distributed.num_processes={arguments.processes}")
    if num_shards is not None:
        overrides.append(f"distributed.num_shards={num_shards}")
    return StageArguments(
        experiment=arguments.experiment,
        store=Path(stack.enter_context(tempfile.TemporaryDirectory())),
        run_id="benchmark",
        num_threads=1,
        config_file=arguments.config,
        overrides=tuple(overrides),
        progress_format="none",
    )


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", choices=PLAIN, default="ddp")
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="steps of one repetition")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    train_together(arguments.processes, partial(rank, arguments))


if __name__ == "__main__":
    main()
