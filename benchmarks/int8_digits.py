"""What int8 costs and saves on digits: trained in full with its own settings, then exported.

    python -m benchmarks.int8_digits [STORE RUN_ID]

With a store and a run id, the champion of that finished run is taken. The bundle is made in a
temporary folder either way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from holdfast.training.bundles.summary import artifact_rows
from holdfast.training.runs.stored_json import read_json

EXPORT = ['export.formats=["onnx_int8"]', "export.int8_metric=accuracy"]
HEAD = "| artifact | test accuracy | same class as the champion | bytes |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "digits/int8"
        if len(sys.argv) == 3:
            shutil.copytree(Path(sys.argv[1]) / "digits" / sys.argv[2], run)
            shutil.rmtree(run / "bundle", ignore_errors=True)
            run = run.rename(run.with_name(sys.argv[2]))
        else:
            for stage in ("segment", "candidates", "evaluate"):
                call(stage, run)
        call("export", run, "--resume", *(word for o in EXPORT for word in ("--set", o)))
        print_table(run / "bundle")


def call(stage: str, run: Path, *words: str) -> None:
    command = [sys.executable, "-m", "holdfast.training", stage, "--experiment", "digits"]
    command += ["--store", str(run.parents[1]), "--run-id", run.name, "--progress", "none"]
    subprocess.run([*command, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def print_table(bundle: Path) -> None:
    """Figures that are the same on every machine; latencies are in the run's report."""
    parity: Any = read_json(bundle / "parity.json")
    print(f"{HEAD}\n|---|---|---|---|")
    for row in artifact_rows(bundle):
        found = parity["details"][row["format"]]["metrics"]["accuracy"]["artifact"]
        print(f"| {row['name']} | {found:.2%} | {row['agreement']:.2%} | {row['size_bytes']:,} |")


if __name__ == "__main__":
    main()
