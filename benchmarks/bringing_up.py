"""From a save to a bucket that has it, where several machines train together in slices.

Machines are commands with scratch disks of their own, each with one process and with the same limit
of bandwidth to a server on this machine. Where the first brings up all, the others' limit lets
nothing through. The time runs from when the checkpoint is begun on the first machine's disk, which
the others' slices are carried to, until the head names it.

    python benchmarks/bringing_up.py [--megabytes 240] [--limit 20] [--machines 2 3]
        [--repetitions 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bucket import ADDRESS, server, tree_of
from interleaving import markdown_table, median_ratio
from saving_together import BYTES_PER_LAYER

from holdfast.training.experiment.loading import experiment_name
from holdfast.training.storage.opening import open_store
from holdfast.training.tiers.bandwidth import LIMIT_VARIABLE
from holdfast.training.tiers.tree import has_checkpoints
from tests.faults.campaign import Training
from tests.flows.prefect_server import wait_until
from tests.training.ranks.machines import Guest, first_of

WIDE = f"{Path(__file__).with_name('saving_together.py')}:Wide"
OVERRIDES = ("train.num_epochs=1", "train.num_threads=1", "distributed.num_processes=1")
NOTHING = "0.000001"
LOOK_EVERY_S = 0.05
PATIENCE_S = 300.0
_wait_until = partial(wait_until, timeout_s=PATIENCE_S, every_s=LOOK_EVERY_S)


class Measured:
    """Runs of one step each, whose one checkpoint is brought up."""

    def __init__(self, folder: Path, megabytes: int, limit: str) -> None:
        self._folder, self._limit = folder, limit
        self._num_layers = max(1, megabytes * 10**6 // BYTES_PER_LAYER)
        self._num_runs = 0

    @property
    def megabytes(self) -> float:
        """Of a checkpoint."""
        return self._num_layers * BYTES_PER_LAYER / 1e6

    def seconds(self, num_machines: int, limit_of_others: str) -> float:
        """Of one run on so many machines."""
        self._num_runs += 1
        folder, run_id = self._folder / str(self._num_runs), f"run-{self._num_runs}"
        widths = [f"distributed.{key}_machines={num_machines}" for key in ("max", "min")]
        overrides = (*OVERRIDES, *widths, f"experiment.num_layers={self._num_layers}")
        training = Training(str(ADDRESS), run_id, WIDE, overrides)  # type: ignore[arg-type]
        guests = [
            Guest(
                training,
                folder / name,
                scratch=str(folder / name),
                name=name,
                environment={LIMIT_VARIABLE: limit_of_others},
            )
            for name in (f"guest-{number}" for number in range(1, num_machines))
        ]
        segment = first_of(
            training,
            *overrides,
            scratch=str(folder / "first"),
            environment={LIMIT_VARIABLE: self._limit},
        )
        try:
            store, name = open_store(ADDRESS), f"{experiment_name(WIDE)}/{run_id}"
            begun = f"first/*/work/{name}/.staging/*/*"
            _wait_until(lambda: any(folder.glob(begun)), what="a checkpoint that is begun")
            duration_s = _wait_until(
                lambda: has_checkpoints(tree_of(store, name).files),
                what="a checkpoint in the bucket",
            )
            assert segment.finish() == 0, "".join(segment.errors)
        finally:
            for guest in guests:
                guest.vanish()
        return duration_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=240)
    parser.add_argument("--limit", type=float, default=20.0, help="MB/s of each machine")
    parser.add_argument("--machines", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    limit = f"{arguments.limit:g}"
    rows = []
    with tempfile.TemporaryDirectory(prefix="bringing-") as name, server(Path(name)) as kind:
        measured = Measured(Path(name), arguments.megabytes, limit)
        for num_machines in arguments.machines:
            alone, together = [], []
            for _ in range(arguments.repetitions):
                alone.append(measured.seconds(num_machines, NOTHING))
                together.append(measured.seconds(num_machines, limit))
            told = [f"{median(one):.1f} s" for one in (alone, together)]
            rows.append([str(num_machines), *told, f"{median_ratio(together, alone):.2f}"])
    print(
        f"{measured.megabytes:.0f} MB, {limit} MB/s a machine, {kind}, {arguments.repetitions} "
        f"repetitions; medians\n"
    )
    header = ["machines", "the first brings up all", "each its own", "ratio"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
