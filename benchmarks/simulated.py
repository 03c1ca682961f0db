"""A trace replayed with real segments, its time compressed, beside what ``simulate`` says of it.

    python benchmarks/simulated.py --trace ../shared/data/spot_traces/p3-trace.csv [--minutes 4]

Costs are not compressed: starts weigh as much as on a trace of minutes. Steps sleep, so that a busy
machine does not change them. Processes are forked from
one that has imported torch. The simulator gets the costs twice: from a calm run before, and from
the records of the replayed run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaving import markdown_table
from holdfast.training.configuration.schema import CheckpointConfig
from holdfast.training.runs.ledger import Ledger
from holdfast.training.simulation.capacity import TraceCapacity, read_trace
from tests.training.simulation.replay import Always, Replay, paced_run, simulated

NOTICE_S = 4.0
EPOCHS_BETWEEN_SAVES = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0, help="to squeeze the trace into")
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--without-notice", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = sys.path[0]  # for the process that segments are forked from
    trace = read_trace(arguments.trace).spread(arguments.seed)
    factor = trace.length_s / (60 * arguments.minutes)
    trace = trace.compressed(factor).with_notices(
        NOTICE_S, arguments.without_notice, arguments.seed
    )
    checkpoint = CheckpointConfig(mean_time_between_preemptions_s=3600 / factor)
    overrides = (
        f"train.num_epochs={arguments.epochs}",
        "train.num_threads=1",
        f"checkpoint.every_epochs={EPOCHS_BETWEEN_SAVES}",
        f"checkpoint.mean_time_between_preemptions_s={checkpoint.mean_time_between_preemptions_s}",
    )
    with tempfile.TemporaryDirectory() as folder:
        calm, real = (Replay(paced_run(Path(folder), name)) for name in ("calm", "replayed"))
        calm.play(Always(), overrides, NOTICE_S)
        real.play(TraceCapacity(trace, 0.0), overrides, NOTICE_S)
        costs = {
            "of a calm run before": calm.costs(EPOCHS_BETWEEN_SAVES),
            "its own": real.costs(EPOCHS_BETWEEN_SAVES),
        }
        spent = real.spent
    rows = [row("replayed", real.finish_s, real.lived_s, len(real.started_s), spent, real)]
    for name, one in costs.items():
        found = simulated(one, trace, checkpoint)
        counted = (found.total_s, found.paid_s, found.num_segments)
        rows.append(row(f"simulated, costs {name}", *counted, found, real))
    print(
        f"{arguments.trace.name}, time compressed {factor:.0f} times: {real.num_told} notices, "
        f"{real.num_vanished} machines vanished\n"
    )
    header = ["", "finish s", "useful share", "done again s", "saving s", "processes", "difference"]
    print(markdown_table(header, rows))
    return 0


def row(
    name: str, finish_s: float, lived_s: float, num_lives: int, spent: Ledger, real: Replay
) -> list[str]:
    """A line of the table; the last column is how the finish differs from the real one."""
    return [
        name,
        f"{finish_s:.1f}",
        f"{spent.useful_s / lived_s:.1%}",
        f"{spent.recomputed_s:.1f}",
        f"{spent.saving_s:.1f}",
        str(num_lives),
        f"{finish_s / real.finish_s - 1:+.1%}",
    ]


if __name__ == "__main__":
    sys.exit(main())
