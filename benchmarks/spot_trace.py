"""Replay a real preemption trace, its time compressed, against three workers; print the ledger.

    python benchmarks/spot_trace.py --trace ../shared/data/spot_traces/p3-trace.csv \\
        --cmapss ../shared/data/cmapss [--minutes 8]

The trace has rows `milliseconds,add|remove,node`. Each of three places holds one node; when that
node is removed, the machine of the place gets its notice (or, for a part of them, vanishes), and
the place is empty until the trace adds a node. What a restart costs is not compressed, so goodput
is worse than it would be over the trace's real eleven hours: the last line says how it scales.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.ledger import Ledger, ledger
from tests.flows.cluster import Cluster, Machine, cluster
from tests.flows.prefect_server import make_template

NUM_PLACES = 3
NOTICE_S = 30.0


@dataclass(frozen=True)
class Change:
    """A node comes or goes, so many seconds after the start of the trace."""

    at_s: float
    is_added: bool
    node: str


@dataclass
class Replay:
    """Three places for machines, filled and emptied as the trace says."""

    machines: Cluster
    chance: random.Random
    share_without_notice: float
    places: dict[str, Machine] = field(default_factory=dict)
    leaving: list[tuple[float, Machine]] = field(default_factory=list)
    num_notices: int = 0
    num_vanished: int = 0

    def apply(self, change: Change) -> None:
        """Let a node come or go."""
        if change.is_added and len(self.places) < NUM_PLACES:
            self.places[change.node] = self.machines.start_machine(change.node)
        elif not change.is_added and change.node in self.places:
            self._remove(self.places.pop(change.node))

    def end_late_ones(self) -> None:
        """SIGKILL to machines whose notice has run out."""
        now_s = time.monotonic()
        for deadline_s, machine in self.leaving:
            if now_s > deadline_s:
                machine.vanish()
        self.leaving = [entry for entry in self.leaving if entry[0] >= now_s]

    def _remove(self, machine: Machine) -> None:
        if self.chance.random() < self.share_without_notice:
            self.num_vanished += 1
            machine.vanish()
            return
        self.num_notices += 1
        machine.notice()
        self.leaving.append((time.monotonic() + NOTICE_S, machine))


def read_trace(path: Path, length_s: float) -> tuple[list[Change], float]:
    """The changes, squeezed into ``length_s``; by how much they were."""
    with path.open(newline="") as file:
        rows = [(float(at), kind == "add", node) for at, kind, node in csv.reader(file)]
    factor = rows[-1][0] / 1000 / length_s
    return [Change(at / 1000 / factor, added, node) for at, added, node in rows], factor


def replay(found: Replay, changes: list[Change], is_over: Iterator[bool]) -> None:
    """Apply the changes when their time has come; then leave the machines that are there."""
    start_s = time.monotonic()
    for change in changes:
        while time.monotonic() - start_s < change.at_s:
            time.sleep(0.2)
            found.end_late_ones()
        if next(is_over):
            return
        found.apply(change)


def polled(machines: Cluster, flow_run: object, every_s: float = 5.0) -> Iterator[bool]:
    """Whether the flow run has ended, asked now and then."""
    asked_s, is_over = 0.0, False
    while True:
        if time.monotonic() - asked_s > every_s:
            asked_s = time.monotonic()
            is_over = machines.state(flow_run) in ("Completed", "Failed")  # type: ignore[arg-type]
        yield is_over


def show(found: Ledger, factor: float) -> None:
    print(found.as_table())
    lost_s = found.paid_s - found.useful_s - found.saving_s
    real_s = found.useful_s * factor + lost_s + found.saving_s * factor
    print(
        f"time was compressed {factor:.0f} times: with the same losses over the real length, "
        f"goodput is {found.useful_s * factor / real_s:.1%}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--cmapss", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--without-notice", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    overrides = (
        f"data.folder={arguments.cmapss.absolute()}",
        f"train.num_epochs={arguments.epochs}",
        "checkpoint.every_s=5",
        "train.num_threads=1",
    )
    changes, factor = read_trace(arguments.trace, arguments.minutes * 60)
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "prefect.db"
        make_template(template)
        with cluster(Path(folder) / "cluster", template) as machines:
            run = RunDirectory(machines.store / "turbofan" / "spot")
            machines.start_rescuer()
            flow_run = machines.create_flow_run("spot", overrides, experiment="turbofan")
            found = Replay(machines, random.Random(arguments.seed), arguments.without_notice)
            replay(found, changes, polled(machines, flow_run))
            if not found.places:
                machines.start_machine("last")
            state = machines.wait_for_state(flow_run, "Completed", "Failed", timeout_s=1800)
            print(machines.timeline(flow_run))
            print(f"\n{state}; {found.num_notices} notices, {found.num_vanished} machines vanished")
            show(ledger(read_segments(run)), factor)
    return 0 if state == "Completed" else 1


if __name__ == "__main__":
    sys.exit(main())
