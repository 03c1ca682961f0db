"""How late leases are renewed on a loaded machine: who lives, and would be taken for dead?

Processes hold a lease each while their Python computes without a pause; others spin, or write and
flush. A reader looks ten times a second. Usage:

    python benchmarks/lease_under_load.py [--minutes 5] [--holders 8] [--spinners 8] [--writers 2]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaving import markdown_table
from holdfast.tasks.engine_lease import ENGINE_TTL_S
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory

LOOK_EVERY_S = 0.1


def hold(folder: str) -> None:
    with Lease.acquire(RunDirectory(Path(folder)), ENGINE_TTL_S):
        spin(folder)


def spin(_: str) -> None:
    while True:
        sum(range(10**6))


def write(folder: str) -> None:
    content = os.urandom(32 * 2**20)
    while True:
        with (Path(folder) / "written").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


ROLES = {"hold": hold, "spin": spin, "write": write}


def watched(leases: list[Path], end_s: float) -> list[float]:
    """Seconds between renewals, as a reader sees them."""
    seen: dict[Path, tuple[int, float]] = {}
    gaps = []
    while (now_s := time.monotonic()) < end_s:
        for path in leases:
            renewed = path.stat().st_mtime_ns
            before = seen.get(path)
            if before is None or before[0] != renewed:
                if before is not None:
                    gaps.append(now_s - before[1])
                seen[path] = (renewed, now_s)
        time.sleep(LOOK_EVERY_S)
    return gaps + [now_s - since_s for _, since_s in seen.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--holders", type=int, default=8)
    parser.add_argument("--spinners", type=int, default=8)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        ROLES[asked.role[0]](asked.role[1])
        return
    roles = ["hold"] * asked.holders + ["spin"] * asked.spinners + ["write"] * asked.writers
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / f"{role}-{number}" for number, role in enumerate(roles)]
        for folder in folders:
            folder.mkdir()
        command = [sys.executable, "-P", __file__, "--role"]
        busy = [
            subprocess.Popen([*command, role, str(folder)])
            for role, folder in zip(roles, folders, strict=True)
        ]
        try:
            while len(leases := [*Path(scratch).glob("hold-*/lease/*.json")]) < asked.holders:
                time.sleep(LOOK_EVERY_S)
            gaps = watched(leases, time.monotonic() + 60 * asked.minutes)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    cuts = quantiles(gaps, n=1000)
    print(
        f"{asked.holders} leases, {asked.spinners} processes that spin and {asked.writers} that "
        f"write on {len(os.sched_getaffinity(0))} cores, {asked.minutes:g} minutes\n"
    )
    values = (cuts[499], cuts[989], cuts[998], max(gaps))
    cells = [f"{len(gaps)}", *(f"{value:.2f}" for value in values)]
    cells.append(f"{sum(gap > ENGINE_TTL_S for gap in gaps)}")
    header = ["renewals", "median s", "99 %", "99.9 %", "most", f"over {ENGINE_TTL_S:g} s"]
    print(markdown_table(header, [cells]))


if __name__ == "__main__":
    main()
