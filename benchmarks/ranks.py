"""The ranks of a benchmark: the same program, started once for each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.training.distributed.launcher import place_of_all, run_ranks
from holdfast.training.distributed.seat import end_with_launcher, own_seat
from holdfast.training.distributed.world import World
from holdfast.training.exactness.reproducibility import child_environment

HANG_TIMEOUT_S = 600.0


def train_together(size: int, rank: Callable[[World], None]) -> None:
    """Start this program so many times, or be one of them."""
    if is_rank():
        with joined_world() as world:
            rank(world)
    else:
        run_in_ranks(size)


def is_rank() -> bool:
    """Whether this process is one of them, and not who starts them."""
    return own_seat() is not None


def run_in_ranks(size: int, *arguments: str) -> None:
    """Start this program so many times, on one thread each; rank 0 prints.

    Exits with 1 where one fails.
    """
    command = [sys.executable, *sys.argv, *arguments]
    with place_of_all(size) as place:
        environments = [child_environment(1)] * place.num_here
        ended = run_ranks(place, command, environments, Path.cwd(), HANG_TIMEOUT_S)
    for rank in ended.ranks:
        if rank.exit_code:
            print("\n".join([f"rank {rank.rank}: {rank.exit_code}", *rank.tail]), file=sys.stderr)
            sys.exit(1)


@contextmanager
def joined_world() -> Iterator[World]:
    """The world of this rank."""
    seat = own_seat()
    assert seat is not None
    end_with_launcher(seat)
    with World.joined(seat) as world:
        yield world


def slowest_s(world: World, seconds: float) -> float:
    """Collective. Of what all did at once, as long as it took the last one."""
    return max(world.gathered(seconds))
