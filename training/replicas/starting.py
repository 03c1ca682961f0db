"""A script's own loop in several processes: the one that the user started starts them.

Each of them runs the whole script. They end together, and the script of the first process does not
go on: what comes after ``holdfast.run`` is theirs.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from holdfast.training.configuration.schema import RunConfig
from holdfast.training.distributed.launcher import place_of_all, run_ranks
from holdfast.training.distributed.seat import end_with_launcher, take_seat
from holdfast.training.distributed.watchdog import answer_for_stacks
from holdfast.training.distributed.world import World
from holdfast.training.errors import InputError
from holdfast.training.preemption.signals import install_signal_flag
from holdfast.training.ranks.gpus import environments_of_ranks
from holdfast.training.ranks.launching import outcome_of
from holdfast.training.runs.progress import Progress
from holdfast.training.stage import StageOutcome

OF_EXPERIMENTS = {
    "num_shards": "a step of a script is one pass, and is not gone through shard by shard",
    **dict.fromkeys(
        ("min_machines", "max_machines", "machines_wait_s", "grow_after_s"),
        "the processes of a script are on one machine",
    ),
}


class EndedInProcessesError(BaseException):
    """The script was run by several processes, and has ended there. Never an error to it."""

    def __init__(self, outcome: StageOutcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def require_for_scripts(key: str, value: object) -> None:
    """Raise InputError for a key of ``[distributed]`` that says nothing to a script."""
    if (key, value) == ("strategy", "fsdp"):
        raise InputError(
            "settings: 'distributed.strategy': expected 'ddp' or 'none', found 'fsdp', which is "
            "for experiments so far: each process of a script has all weights"
        )
    if key in OF_EXPERIMENTS:
        raise InputError(f"settings: 'distributed.{key}': {OF_EXPERIMENTS[key]}; leave it out")


def run_in_processes(config: RunConfig, num_threads: int, progress: Progress) -> StageOutcome:
    """Run this process's own command once for each process, until all have ended.

    ``num_threads`` of each. What rank 0 prints comes out where this process's own would.
    """
    install_signal_flag()
    distributed = config.distributed
    with place_of_all(distributed.num_processes) as place:
        ended = run_ranks(
            place,
            _own_command(),
            _environments(distributed.num_processes, num_threads),
            Path.cwd(),
            distributed.hang_timeout_s,
            on_started=lambda pids: progress.emit("ranks", pids=[*pids]),
            output=progress.stream,
        )
    return outcome_of(ended, distributed.hang_timeout_s)


def _own_command() -> list[str]:
    """As the user has started this process, or as another of ours has: with its search path."""
    command = list(sys.orig_argv)
    command[0] = sys.executable
    return command


def _environments(num_processes: int, num_threads: int) -> list[dict[str, str]]:
    """Of each process. Torch warns of what is on purpose; see ``replicas/copies.py``.

    Where GPUs are too few for all, the script may want CPUs.
    """
    device: Literal["auto", "cpu"] = "auto" if torch.cuda.device_count() >= num_processes else "cpu"
    return [
        {"TORCH_CPP_LOG_LEVEL": "ERROR", **own}
        for own in environments_of_ranks(num_processes, num_threads, device)
    ]


def join_others(closing: ExitStack) -> World | None:
    """The world of the processes that run this script; None in one that runs it alone.

    It is left when ``closing`` is closed. Raises RankLostError where not all come.
    """
    seat = take_seat()
    if seat is None:
        return None
    end_with_launcher(seat)
    answer_for_stacks()
    return closing.enter_context(World.joined(seat))
