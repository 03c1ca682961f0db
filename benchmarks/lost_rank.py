"""From SIGKILL of one rank to the first new step: how long, and why.

A run trains in several processes of this machine; one of them is killed, and the same command is
given again at once; the task that trains pauses first, as after every crash. Prints each part's
median. Usage:

    python benchmarks/lost_rank.py [--processes 3] [--kills 5]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleaving import markdown_table

from tests.faults.campaign import Segment, Training

OVERRIDES = (
    "distributed.strategy=ddp",
    "train.num_epochs=100000",
    "train.num_threads=1",
    "checkpoint.every_s=2",
    "logging.every_s=0.01",
)
PARTS = {
    "ending": "the others notice, rank 0 lets its save end, the launcher says who was lost",
    "launching": "the command is given again: Python and torch are imported",
    "restoring": "the ranks do so, too, meet, build, and restore the newest checkpoint",
    "stepping": "to the first new step",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    arguments = parser.parse_args()
    choice = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        shards = f"distributed.num_shards={arguments.processes}"
        training = Training(Path(folder), "lost", "digits", (*OVERRIDES, shards), is_cold=True)
        segment = started(training, arguments.processes)
        rows = []
        try:
            pids = wait(segment, "ranks")["pids"]
            wait(segment, "saved")
            for _ in range(arguments.kills):
                row, segment, pids = recovered(training, segment, pids, choice)
                rows.append(row)
                time.sleep(1)
        finally:
            segment.kill(signal.SIGKILL)
            segment.finish()
    table = [
        [name, f"{statistics.median(row[name] for row in rows):.2f}", told]
        for name, told in {**PARTS, "all": ""}.items()
    ]
    title = f"digits, {arguments.processes} processes, median of {len(rows)}"
    print(markdown_table([title, "s", ""], table))


def started(training: Training, num_processes: int) -> Segment:
    """A segment as users start it."""
    return training.start({}, ["--set", f"distributed.num_processes={num_processes}"])


def recovered(
    training: Training, segment: Segment, pids: list[int], choice: random.Random
) -> tuple[dict[str, float], Segment, list[int]]:
    """Kill a rank, start again; seconds of each part, the new segment, its ranks."""
    marks = [time.monotonic()]
    os.kill(choice.choice(pids), signal.SIGKILL)
    code = segment.finish()
    assert code == 1, f"exit code {code}: {''.join(segment.errors)}"
    marks.append(time.monotonic())
    segment = started(training, len(pids))
    pids = wait(segment, "ranks")["pids"]
    marks.append(time.monotonic())
    for name in ("restored", "progress"):
        wait(segment, name)
        marks.append(time.monotonic())
    parts = dict(zip(PARTS, (b - a for a, b in pairwise(marks)), strict=True))
    return {**parts, "all": marks[-1] - marks[0]}, segment, pids


def wait(segment: Segment, name: str) -> dict[str, Any]:
    """The next event of this name."""
    event = segment.wait_for(name)
    assert event is not None, "".join(segment.errors)
    return event


if __name__ == "__main__":
    main()
