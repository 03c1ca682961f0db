"""``make chaos KILLS=1000``: kill trainings at random moments, in parallel, and compare bytes.

Every campaign has a seed; a failure prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from holdfast.training.runs.faultpoints import FAULT_POINTS, SLICE_POINTS
from tests.faults.campaign import (
    HARD_IN_SHARDS,
    SPREAD,
    Training,
    complete,
    differences,
    final_state,
    kill_until_complete,
)

KILLS_PER_RUN = 8
RARE = ("restore.", "replace.")  # they need a damaged checkpoint, or the same step saved twice
POINTS = [name for name in sorted(FAULT_POINTS) if not name.startswith(RARE)]


NUM_SHARDS = 4
STRATEGIES = {
    "ddp": ("distributed.strategy=ddp",),
    "fsdp": (SPREAD, "data.should_drop_last=true"),
}
SMALL = {
    "language_model": (
        "experiment.num_generated=500",
        "experiment.context=16",
        "experiment.width=16",
        "experiment.dropout=0.1",
        "experiment.vocabulary=bpe",
        "experiment.vocabulary_size=300",
        "data.batch_size=8",
        "train.num_microbatches=2",
        "train.num_epochs=6",
        "train.steps_per_epoch=50",
        "scheduler.args.T_max=280",
        "train.num_threads=1",
    ),
}
"""Experiments that come with Holdfast, as they are killed; else it is the hard one of the tests."""


def the_training(
    folder: Path,
    name: str,
    overrides: tuple[str, ...],
    processes: int,
    strategy: str,
    experiment: str | None = None,
) -> Training:
    """What is killed: one process, or up to ``processes``, another number in each segment."""
    shards = (f"distributed.num_shards={NUM_SHARDS}", *STRATEGIES[strategy])
    if experiment is not None:
        own = (*SMALL[experiment], *(shards if processes > 1 else ()), *overrides)
        return Training(folder, name, experiment, own, True, processes)
    if processes == 1:
        return Training(folder, name, overrides=overrides, is_cold=True)
    overrides = (*shards, "train.num_epochs=8", *overrides)
    return Training(folder, name, HARD_IN_SHARDS, overrides, True, processes)


def campaign(
    seed: int,
    folder: Path,
    num_kills: int,
    calm: dict[str, bytes],
    build: Callable[[Path, str, tuple[str, ...]], Training],
) -> tuple[int, str]:
    """Kill one run; returns how many kills it got, and what went wrong or nothing.

    ``build`` is ``the_training`` as it was asked for.
    """
    rng = random.Random(seed)
    overrides = (f"checkpoint.every_steps={rng.randint(2, 9)}",)
    overrides += (f"data.num_workers={rng.choice([0, 2])}",)
    training = build(folder, f"seed-{seed}", overrides)
    points = [*POINTS, *SLICE_POINTS] if SPREAD in training.overrides else POINTS
    try:
        deeds = kill_until_complete(training, rng, num_kills, 0.6, points)
    except AssertionError as error:
        return 0, str(error)
    wrong = differences(calm, final_state(training.run))
    return len(deeds), f"differs in {', '.join(wrong)}" if wrong else ""


def main() -> int:
    """Run as many campaigns as the kills need. Returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first campaign")
    parser.add_argument("--processes", type=int, default=1, help="most processes of a segment")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of several")
    parser.add_argument("--experiment", choices=list(SMALL), help="kill trainings of this one")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    num_runs = num_failed = num_kills = 0
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="holdfast-chaos-") as name:
        folder = Path(name)
        processes, experiment = arguments.processes, arguments.experiment
        strategy = arguments.strategy
        build = partial(the_training, processes=processes, strategy=strategy, experiment=experiment)
        calm_training = replace(build(folder, "calm", ()), most_processes=1)
        complete(calm_training)
        calm = final_state(calm_training.run)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            seed = arguments.seed
            while num_kills < arguments.kills and not num_failed:
                num_missing = arguments.kills - num_kills
                seeds = range(seed, seed - (-num_missing // KILLS_PER_RUN))
                results = pool.map(
                    lambda seed: campaign(seed, folder, KILLS_PER_RUN, calm, build), seeds
                )
                for seed, (num_done, problem) in zip(seeds, results, strict=True):
                    num_runs += 1
                    num_kills += num_done
                    if problem:
                        num_failed += 1
                        repeat = f"python -m tests.faults.chaos --kills 1 --seed {seed}"
                        repeat += f" --processes {processes} --strategy {strategy}"
                        repeat += f" --experiment {experiment}" if experiment else ""
                        print(f"FAILED seed {seed}: {problem}; repeat with: {repeat}", flush=True)
                seed += 1
    elapsed_s = time.monotonic() - start_s
    print(f"{num_runs} runs, {num_kills} kills, {num_failed} failed, {elapsed_s:.0f} s")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
