"""When a kill is noticed, and what goes wrong: leases and rescuers by a clock that is driven.

Real leases, verdicts and rescuer; six of ten processes are killed, two sleep up to 40 s, store and
server answer late: see tests/flows/driven_rescue.py. Usage:

    python benchmarks/rescue_trials.py [--trials 1000]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaving import markdown_table
from tests.flows.driven_rescue import TRIAL_S, Trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    num_trials = parser.parse_args().trials
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        found = [Trial(Path(folder) / str(seed), seed).play() for seed in range(num_trials)]
    notices = [seconds for one in found for seconds in one.notices_s]
    print(f"{num_trials} trials of {TRIAL_S:g} s, {len(notices)} kills that were noticed\n")
    rows = [
        row("noticed after", notices),
        row("next checkpoint after", [seconds for one in found for seconds in one.recoveries_s]),
    ]
    print(markdown_table(["seconds from the kill", "median", "90 %", "99 %", "most"], rows))
    print(f"\nruns that two processes wrote at once: {sum(one.num_doubled for one in found)}")
    print(f"kills that nobody noticed within a minute: {sum(one.num_stranded for one in found)}")
    print(f"sleeping engines taken for dead: {sum(one.num_asleep for one in found)}")
    print(f"others that lived and were taken for dead: {sum(one.num_false for one in found)}")


def row(name: str, values: Sequence[float]) -> list[str]:
    cuts = quantiles(values, n=100)
    return [name, *(f"{value:.1f}" for value in (cuts[49], cuts[89], cuts[98], max(values)))]


if __name__ == "__main__":
    main()
