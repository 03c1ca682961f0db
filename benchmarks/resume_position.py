"""First batch after a resume, by the size of the data set and the place: time and memory.

Beside it, where memory allows, what is usual: draw the order of the whole epoch with
torch.randperm, and skip the batches that were seen.

    python benchmarks/resume_position.py [--repetitions N]
"""

from __future__ import annotations

import argparse
import itertools
import tracemalloc
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from interleaving import interleaved, markdown_table
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

from holdfast.training.data.loader import FixedSizePlan, Loader

SIZES = (10**4, 10**6, 10**8)
LARGEST_USUAL_SIZE = 10**6
BATCH_SIZE = 64


class Numbers:
    """As many items as are asked for, none of them in memory."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((8,), float(index)), index


def first_batch(num_items: int, step: int) -> object:
    plan = FixedSizePlan(num_items, BATCH_SIZE, False, 0)
    return next(Loader(Numbers(num_items), plan, seed=0).steps(0, step))


def usual_first_batch(num_items: int, step: int) -> object:
    numbers = Numbers(num_items)
    order = RandomSampler(numbers, generator=torch.Generator().manual_seed(0))
    indices = next(itertools.islice(BatchSampler(order, BATCH_SIZE, False), step, None))
    return torch.utils.data.default_collate([numbers[index] for index in indices])


def peak_bytes(run: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def name_of(what: str, num_items: int, is_late: bool) -> str:
    return f"{what}, n = 10^{len(str(num_items)) - 1}, {'0.9 n' if is_late else '0'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=21)
    repetitions = parser.parse_args().repetitions
    cases = {
        name_of("Holdfast", n, is_late): partial(
            first_batch, n, 9 * n // 10 // BATCH_SIZE if is_late else 0
        )
        for n in SIZES
        for is_late in (False, True)
    }
    usual = {
        name_of("randperm and skip", n, is_late): partial(
            usual_first_batch, n, 9 * n // 10 // BATCH_SIZE if is_late else 0
        )
        for n in SIZES
        if n <= LARGEST_USUAL_SIZE
        for is_late in (False, True)
    }
    seconds = {**interleaved(cases, repetitions), **interleaved(usual, repetitions // 5)}
    memory = {name: peak_bytes(run) for name, run in {**cases, **usual}.items()}
    rows = [
        [name, f"{median(times) * 1e3:.2f}", f"{memory[name] / 1e3:.0f}"]
        for name, times in seconds.items()
    ]
    print(markdown_table(["first batch after a resume", "ms", "peak kB"], rows))
    ours = [median(seconds[name]) for name in cases]
    sizes = [memory[name] for name in cases]
    print(f"\nslowest / fastest place: {max(ours) / min(ours):.2f}")
    print(f"most / least memory: {max(sizes) / min(sizes):.2f}")


if __name__ == "__main__":
    main()
