"""What ``holdfast run`` adds to the same stages started by hand, and whose it is.

Three cases, interleaved: each stage by ``python -m training``; ``holdfast run`` with a temporary
server; an empty Prefect flow with a temporary server, which is Prefect's own part. What remains
is ours. Usage:

    python benchmarks/pipeline_overhead.py [--repetitions 3] [--epochs 5]
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaving import interleaved, markdown_table

STAGES = ("segment", "candidates", "evaluate", "export", "promote", "report")
LIMIT_S = 5.0
EMPTY_FLOW = """
from prefect import flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
    flow(lambda: None, name="empty")()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), arguments.repetitions, arguments.epochs)
    by_hand_s, with_holdfast_s, empty_s = (median(seconds[name]) for name in seconds)
    differences = zip(*seconds.values(), strict=True)
    ours_s = median(run_s - hand_s - flow_s for hand_s, run_s, flow_s in differences)
    rows = [
        ["stages by hand", f"{by_hand_s:.1f}"],
        ["`holdfast run`, temporary server", f"{with_holdfast_s:.1f}"],
        ["an empty flow, temporary server (Prefect's part)", f"{empty_s:.1f}"],
        ["ours", f"{ours_s:.1f}"],
    ]
    print(markdown_table(["case", "median, s"], rows))
    print(f"ours is {'below' if ours_s < LIMIT_S else 'ABOVE'} {LIMIT_S:g} s")


def measure(folder: Path, repetitions: int, epochs: int) -> dict[str, list[float]]:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"},
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "ERROR",
    }
    numbers = itertools.count()

    def call(*argv: str) -> None:
        done = subprocess.run(
            [sys.executable, *argv], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr[-2000:]}")

    def options() -> list[str]:
        store = folder / f"store-{next(numbers)}"
        return ["--store", str(store), "--run-id", "r", "--set", f"train.num_epochs={epochs}"]

    def by_hand() -> None:
        given = options()
        for stage in STAGES:
            resume = [] if stage == "segment" else ["--resume"]
            call("-m", "training", stage, "--experiment", "digits", *given, *resume)

    return interleaved(
        {
            "by hand": by_hand,
            "holdfast run": lambda: call("-m", "flows", "run", "digits", *options()),
            "empty flow": lambda: call("-c", EMPTY_FLOW),
        },
        repetitions,
    )


if __name__ == "__main__":
    main()
