"""What ``holdfast run`` adds to the same stages started by hand, and whose it is.

Three cases, interleaved: each stage by ``python -m holdfast.training``; ``holdfast run`` with a
temporary server; an empty Prefect flow with a temporary server, which is Prefect's own part. What
remains is ours. Processor seconds are told as well: on a busy machine they are the steadier
figure. Usage:

    python benchmarks/pipeline_overhead.py [--repetitions 3] [--epochs 5]
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaving import interleaved, markdown_table

STAGES = ("segment", "candidates", "evaluate", "export", "promote", "report")
LIMIT_S = 5.0
TITLES = (
    "stages by hand",
    "`holdfast run`, temporary server",
    "an empty flow, temporary server (Prefect's part)",
    "ours: what remains, in each repetition",
)
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
        wall_s, processor_s = measure(Path(folder), arguments.repetitions, arguments.epochs)
    rows = [
        [title, f"{wall:.1f}", f"{processor:.1f}"]
        for title, wall, processor in zip(
            TITLES, medians(wall_s), medians(processor_s), strict=True
        )
    ]
    print(markdown_table(["case, median", "wall s", "processor s"], rows))
    ours_s = medians(wall_s)[-1]
    print(f"ours is {'below' if ours_s < LIMIT_S else 'ABOVE'} {LIMIT_S:g} s")


def medians(seconds: dict[str, list[float]]) -> list[float]:
    """Of each case, and of what remains in each repetition once the other two are taken away."""
    rows = zip(*seconds.values(), strict=True)
    ours = [run_s - hand_s - flow_s for hand_s, run_s, flow_s in rows]
    return [*map(median, seconds.values()), median(ours)]


def measure(
    folder: Path, repetitions: int, epochs: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and processor seconds of each repetition of each case."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"},
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "PREFECT_LOGGING_LEVEL": "ERROR",
    }
    # One thread: threads that wait for each other on a busy machine would be all that is measured.
    settings = ["--set", f"train.num_epochs={epochs}", "--set", "train.num_threads=1"]
    numbers = itertools.count()

    def call(*argv: str) -> None:
        done = subprocess.run(
            [sys.executable, *argv], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr[-2000:]}")

    def options() -> list[str]:
        store = folder / f"store-{next(numbers)}"
        return ["--store", str(store), "--run-id", "r", *settings]

    def by_hand() -> None:
        given = options()
        for stage in STAGES:
            resume = [] if stage == "segment" else ["--resume"]
            call("-m", "holdfast.training", stage, "--experiment", "digits", *given, *resume)

    processor_s: dict[str, list[float]] = {}

    def counted(name: str, case: Callable[[], None]) -> Callable[[], None]:
        processor_s[name] = []

        def run() -> None:
            before_s = children_s()
            case()
            processor_s[name].append(children_s() - before_s)

        return run

    cases = {
        "by hand": by_hand,
        "holdfast run": lambda: call("-m", "holdfast", "run", "digits", *options()),
        "empty flow": lambda: call("-c", EMPTY_FLOW),
    }
    wall_s = interleaved({name: counted(name, case) for name, case in cases.items()}, repetitions)
    # The first run of each does not count.
    return wall_s, {name: values[1:] for name, values in processor_s.items()}


def children_s() -> float:
    """Processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
