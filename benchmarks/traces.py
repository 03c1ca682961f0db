"""What traces cost runs whose own costs were measured: a table, by ``holdfast simulate``.

python benchmarks/traces.py --traces ../shared/data/spot_traces
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaving import markdown_table

SHARES = (0.0, 0.2, 1.0)
PRICES = ("prices.spot_per_hour=0.92", "prices.on_demand_per_hour=3.06")


@dataclass(frozen=True)
class Kind:
    """A run with costs that were measured once."""

    name: str
    options: tuple[str, ...]


KINDS = (
    Kind(
        "GPT-2 of 124 M parameters on one H200",
        (
            *("--num-steps", "600000", "--step-s", "0.0611", "--save-s", "0.047"),
            *("--durable-s", "1.0", "--start-s", "12"),
        ),
    ),
    Kind(
        "Short steps and small saves, as of turbofan on two cores",
        (
            *("--num-steps", "180000", "--step-s", "0.2", "--save-s", "0.02"),
            *("--durable-s", "0.2", "--start-s", "4", "--epoch-steps", "2000"),
        ),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder with CSV files")
    arguments = parser.parse_args()
    machines = [
        (path.name, ("--trace", str(path))) for path in sorted(arguments.traces.glob("*.csv"))
    ]
    machines.append(("exponential, 1 h in the mean", ("--mean-life-s", "3600")))
    for kind in KINDS:
        print(f"{kind.name}: `{' '.join(kind.options)}`\n")
        rows = [
            row(name, share, simulated(*options, *kind.options, "--without-notice", str(share)))
            for name, options in machines
            for share in SHARES
        ]
        header = ["machines, share that vanishes without a notice", "finish h", "segments"]
        header += ["useful share", "the best", "best interval", "closeness", "saved"]
        print(markdown_table(header, rows), end="\n\n")
    return 0


def simulated(*options: str) -> dict[str, Any]:
    """What ``holdfast simulate --json`` says."""
    prices = [word for price in PRICES for word in ("--set", price)]
    code = "from holdfast.flows.command_line.group import main; main()"
    command = [sys.executable, "-P", "-c", code, "simulate", *options, *prices, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(name: str, share: float, found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    interval_s, money = found["best_interval_s"], found["money"]
    return [
        f"{name}, {share:.0%}",
        f"{found['online']['finish_s']['mean'] / 3600:.2f}",
        f"{found['online']['mean']['num_segments']}",
        f"{found['online']['useful_share']:.2%}",
        f"{found['best']['useful_share']:.2%}",
        "none" if interval_s is None else f"{interval_s:.0f} s",
        f"{found['closeness']:.1%}",
        f"{money['saved'] / money['on_demand']:.0%}",
    ]


if __name__ == "__main__":
    sys.exit(main())
