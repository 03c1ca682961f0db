"""From SIGKILL of everything on a machine to the first new step on another: how long, and why.

A run is trained by one of two machines; everything on the one that trains is killed, again and
again, while a rescuer watches. Prints each part's median, and its longest. Usage:

    python benchmarks/time_to_recover.py [--kills 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import UUID

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaving import markdown_table
from holdfast.tasks.attempts import newest_step
from holdfast.training.runs.directory import RunDirectory, SegmentRecord, read_segments
from tests.flows.cluster import Cluster, Machine, cluster
from tests.flows.prefect_server import make_template, wait_until

OVERRIDES = ("train.num_epochs=100000", "checkpoint.every_s=2", "train.num_threads=1")
PATIENCE_S = 180.0
PARTS = {
    "noticing": "SIGKILL to Crashed: the lease (8 s, renewed every second), a look every second",
    "pausing": "Crashed to AwaitingRetry: none before a first attempt without progress",
    "taking up": "to Pending: a worker polls every second",
    "engine": "to Running: Prefect's engine starts",
    "child": "to the first step: torch is imported, the newest checkpoint restored",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    num_kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "prefect.db"
        make_template(template)
        with cluster(Path(folder) / "cluster", template) as machines:
            rows = measure(machines, num_kills)
    show(rows)


def measure(machines: Cluster, num_kills: int) -> list[dict[str, float]]:
    """Kill the machine that trains so often; seconds of each part of each recovery."""
    machines.start_rescuer()
    machines.start_machine("machine-0")
    run = RunDirectory(machines.store / "digits" / "recover")
    flow_run = machines.create_flow_run("recover", OVERRIDES)
    rows = []
    for number in range(num_kills):
        segments = len(segment_records(run)) if number else 1
        wait_until(lambda: has_stepped(run, segments), PATIENCE_S, "training", machines.story)  # noqa: B023
        machines.start_machine(f"machine-{number + 1}")
        step = newest_step(run)
        wait_until(lambda: newest_step(run) > step, PATIENCE_S, "a checkpoint", machines.story)  # noqa: B023
        rows.append(recover(machines, run, flow_run))
        told = " ".join(f"{name} {seconds:.1f} s" for name, seconds in rows[-1].items())
        print(told, file=sys.stderr, flush=True)
    return rows


def recover(machines: Cluster, run: RunDirectory, flow_run: UUID) -> dict[str, float]:
    """Kill everything where the run is trained; the parts of what follows."""
    time.sleep(5)  # the new machine polls by then
    (training,) = [m for m in trainers(machines) if m.children()]
    segments = len(segment_records(run))
    killed = time.time()
    training.vanish()
    wait_until(
        lambda: has_stepped(run, segments + 1), PATIENCE_S, "a step", machines.story, every_s=0.05
    )
    stepped = time.time()
    at: dict[str, float] = {}
    for state in machines.history(flow_run):
        moment = state.timestamp.timestamp()
        if moment > killed:
            at.setdefault("Running" if state.name == "Retrying" else state.name, moment)
    marks = [killed, at["Crashed"], at["AwaitingRetry"], at["Pending"], at["Running"], stepped]
    parts = {
        name: later - earlier for name, earlier, later in zip(PARTS, marks, marks[1:], strict=False)
    }
    return {**parts, "all": stepped - killed}


def trainers(machines: Cluster) -> list[Machine]:
    return [m for m in machines.machines.values() if m.process.poll() is None]


def segment_records(run: RunDirectory) -> list[SegmentRecord]:
    return read_segments(run) if run.segments.is_dir() else []


def has_stepped(run: RunDirectory, num_segments: int) -> bool:
    """Whether the segment of this number has done a step."""
    records = segment_records(run)
    return len(records) >= num_segments and records[-1].end_step > records[-1].start_step


def show(rows: list[dict[str, Any]]) -> None:
    cells = []
    for name in [*PARTS, "all"]:
        sorted_s = sorted(row[name] for row in rows)
        shown = (statistics.median(sorted_s), sorted_s[int(0.9 * len(rows))], sorted_s[-1])
        cells.append([name, *(f"{seconds:.1f}" for seconds in shown), PARTS.get(name, "")])
    print(f"\n{len(rows)} kills, seconds\n")
    print(markdown_table(["part", "median", "90 %", "longest", "which is"], cells))


if __name__ == "__main__":
    main()
