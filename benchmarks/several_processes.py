"""Steps per second of several processes, beside a loop with torch's DistributedDataParallel.

All loops live in the same processes and take turns. Each fetches its part of a step, computes,
sums the gradients, updates the weights and one moving average, on one thread a process. Two shards
a process cost two smaller passes; so there is also a loop with DDP that does two.

    python benchmarks/several_processes.py [--experiment NAME] [--processes N] [--set KEY=VALUE]...
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from interleaving import interleaved, markdown_table, median_ratio
from torch._C._distributed_c10d import FileStore, PrefixStore
from torch.nn.parallel import DistributedDataParallel

from holdfast.training.distributed.world import World
from holdfast.training.loop.evaluation import move
from holdfast.training.loop.segment import build_trainer
from holdfast.training.optimizers.building import build_optimizer
from holdfast.training.runs.costs import Costs
from holdfast.training.stage import Stage, StageArguments, prepared_stage

PLAIN = "torch's DDP"
IN_TWO = f"{PLAIN} in 2 passes"
OWN = "without num_shards"


def plain_loop(stage: Stage, num_steps: int, num_passes: int = 1) -> Callable[[], None]:
    """What one would write by hand."""
    config, experiment = stage.config, stage.experiment
    dataset = experiment.dataset("train")
    model = experiment.model().train()
    wrapped = DistributedDataParallel(model)
    optimizer = build_optimizer(config.optimizer, model)
    fetch = getattr(dataset, "fetch")  # noqa: B009  # optional in the protocol
    live = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    averages = [tensor.clone() for tensor in live]
    rank, size = dist.get_rank(), dist.get_world_size()

    def batches() -> Iterator[torch.Tensor]:
        while True:
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
            yield from order.split(config.data.batch_size)

    stream = batches()

    def run() -> None:
        for _ in range(num_steps):
            own = next(stream)[rank::size]
            optimizer.zero_grad(set_to_none=True)
            for number, part in enumerate(own.chunk(num_passes), 1):
                batch = move(fetch(part.tolist()), torch.device("cpu"))
                with nullcontext() if number == num_passes else wrapped.no_sync():
                    loss = experiment.loss(wrapped, batch) / num_passes
                    loss.backward()  # type: ignore[no-untyped-call]
            if config.train.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
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


def rank(arguments: argparse.Namespace) -> None:
    """Time the loops as one of the processes; rank 0 prints the table."""
    size = arguments.processes
    store = FileStore(arguments.meeting, size)
    dist.init_process_group("gloo", store=store, rank=arguments.rank, world_size=size)
    world = World(arguments.rank, size, PrefixStore("world", store))
    shards = {OWN: None, f"num_shards={size}": size, f"num_shards={2 * size}": 2 * size}
    with ExitStack() as stack:
        cases: dict[str, Callable[[], None]] = {}
        for name, num_shards in shards.items():
            stage = stack.enter_context(
                prepared_stage(_stage_arguments(arguments, stack, num_shards), world=world)
            )
            if not cases:
                cases[PLAIN] = plain_loop(stage, arguments.steps)
                cases[IN_TWO] = plain_loop(stage, arguments.steps, 2)
            cases[name] = own_loop(stage, arguments.steps)
        seconds = interleaved(cases, arguments.repetitions)
    if arguments.rank == 0:
        rows = [
            [
                name,
                f"{arguments.steps / median(times):.1f}",
                f"{median_ratio(seconds[PLAIN], times):.3f}",
                f"{median_ratio(seconds[IN_TWO], times):.3f}",
            ]
            for name, times in seconds.items()
        ]
        title = f"{arguments.experiment}, {size} processes"
        print(markdown_table([title, "steps/s", f"to {PLAIN}", "in 2 passes"], rows))
    dist.barrier()
    dist.destroy_process_group()


def _stage_arguments(
    arguments: argparse.Namespace, stack: ExitStack, num_shards: int | None
) -> StageArguments:
    overrides = [*arguments.overrides, "distributed.strategy=ddp"]
    overrides.append(f"distributed.num_processes={arguments.processes}")
    if num_shards is not None:
        overrides.append(f"distributed.num_shards={num_shards}")
    return StageArguments(
        experiment=arguments.experiment,
        store=Path(stack.enter_context(tempfile.TemporaryDirectory())),
        run_id="benchmark",
        num_threads=1,
        overrides=tuple(overrides),
        progress_format="none",
    )


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="steps of one repetition")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--meeting", f"{folder}/meeting"]
        ranks = [
            subprocess.Popen([*command, "--rank", str(number)])
            for number in range(arguments.processes)
        ]
        codes = [process.wait() for process in ranks]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
