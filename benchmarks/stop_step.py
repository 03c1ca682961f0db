"""What it costs that all processes stop after the same step, in microseconds.

Whether a process has a notice is one more number in the vector of losses that a step sums anyway.
Beside it is what asking apart would cost in each step: a sum of its own, and a look into the store
over which the processes meet. Nothing is computed beside.

    python benchmarks/stop_step.py [--processes N] [--repetitions N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import torch
from interleaving import interleaved, markdown_table
from ranks import train_together

from holdfast.training.distributed.world import World

NUM_LOSSES = 64
NUM_CALLS = 20  # of one repetition


def rank(arguments: argparse.Namespace, world: World) -> None:
    """Time the rivals as one of the processes; rank 0 prints the table."""

    def summed(size: int) -> Callable[[], None]:
        values = torch.zeros(size, dtype=torch.float64)

        def run() -> None:
            for _ in range(NUM_CALLS):
                world.sum_of(values)

        return run

    def looked() -> None:
        for _ in range(NUM_CALLS):
            world.told_so_far("stop")

    cases = {
        "sum of the losses alone": summed(NUM_LOSSES),
        "with one more number: whether there is a notice": summed(NUM_LOSSES + 1),
        "apart: a sum of its own": summed(1),
        "apart: a look into the store": looked,
    }
    seconds = interleaved(cases, arguments.repetitions)
    if world.rank == 0:
        rows = [
            [
                name,
                f"{1e6 * median(times) / NUM_CALLS:.0f}",
                f"{1e6 * quantiles(times, n=20)[-1] / NUM_CALLS:.0f}",
            ]
            for name, times in seconds.items()
        ]
        title = f"{world.size} processes, {NUM_LOSSES} losses"
        print(markdown_table([title, "µs", "95 of 100 below"], rows))


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=200)
    arguments = parser.parse_args()
    train_together(arguments.processes, partial(rank, arguments))


if __name__ == "__main__":
    main()
