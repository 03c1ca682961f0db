"""Time and memory of export, parity, latency and bundle: digits and turbofan in one run.

    python -m benchmarks.export_cost DATA_FOLDER

The models are not trained: what an export costs does not depend on the weights. ``DATA_FOLDER``
holds C-MAPSS; without it, turbofan is left out. A wide digits model shows how memory grows with
the model. The peak is that of the largest process, which is the stage itself or the fresh one that
checks. Nearly all of the first row's are the libraries; the other rows say by how many times the
further weights the peak is higher.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.training.bundles.consumer import read_manifest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CHOOSE_UNTRAINED = """
import sys
from pathlib import Path
import torch
from holdfast.training.averages.averaging import write_weights
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.bundles.consumer import file_digest
from holdfast.training.stage import StageArguments, prepared_stage
name, store, *overrides = sys.argv[1:]
arguments = StageArguments(
    experiment=name, store=Path(store), run_id="cost", num_threads=1,
    overrides=tuple(overrides), progress_format="none",
)
with prepared_stage(arguments) as stage:
    path = stage.run.candidates / "untrained/model.safetensors"
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    write_weights(path, stage.experiment.model().state_dict())
    where = path.relative_to(stage.run.path).as_posix()
    chosen = {"digest": file_digest(path), "metrics": {}, "name": "untrained", "path": where}
    write_json_durably(stage.run.evaluation_json, {"champion": chosen})
"""


def main() -> None:
    widths = [("digits", (f"experiment.width={width}",)) for width in (256, 512)]
    cases: list[tuple[str, tuple[str, ...]]] = [("digits", ()), *widths]
    if len(sys.argv) > 1:
        cases.append(("turbofan", (f"data.folder='{sys.argv[1]}'",)))
    print("| experiment | weights MB | bundle MB | seconds | peak MB | growth |")
    print("|---|---|---|---|---|---|")
    first = measure(*cases[0])
    print(row(first, first))
    for case in cases[1:]:
        print(row(measure(*case), first), flush=True)


@dataclass(frozen=True)
class Cost:
    """What one export took."""

    name: str
    weights_mb: float
    bundle_mb: float
    duration_s: float
    peak_mb: float


def measure(name: str, overrides: tuple[str, ...]) -> Cost:
    with tempfile.TemporaryDirectory() as store:
        choose = [sys.executable, "-c", CHOOSE_UNTRAINED, name, store, *overrides]
        subprocess.run(choose, check=True, env=ENVIRONMENT)
        command = [sys.executable, "-m", "holdfast.training", "export", "--experiment", name]
        command += ["--store", store, "--run-id", "cost", "--progress", "none"]
        command += [word for override in overrides for word in ("--set", override)]
        duration_s, peak_mb = run_measured(command)
        (bundle,) = Path(store).glob("*/cost/bundle")
        manifest = read_manifest(bundle)
    return Cost(
        name=", ".join([name, *(o for o in overrides if not o.startswith("data."))]),
        weights_mb=manifest["formats"]["weights"]["size_bytes"] / 1e6,
        bundle_mb=sum(entry["size_bytes"] for entry in manifest["files"].values()) / 1e6,
        duration_s=duration_s,
        peak_mb=peak_mb,
    )


def row(cost: Cost, first: Cost) -> str:
    growth = "-"
    if cost is not first:
        times = (cost.peak_mb - first.peak_mb) / (cost.weights_mb - first.weights_mb)
        growth = f"{times:.1f} times the weights"
    return (
        f"| {cost.name} | {cost.weights_mb:.2f} | {cost.bundle_mb:.2f} | {cost.duration_s:.1f} "
        f"| {cost.peak_mb:.0f} | {growth} |"
    )


def run_measured(command: list[str]) -> tuple[float, float]:
    """Seconds, and the peak memory in MB of the largest of the process and its children."""
    start_s = time.perf_counter()
    child = subprocess.Popen(command, env=ENVIRONMENT)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return time.perf_counter() - start_s, usage.ru_maxrss / 1e3


if __name__ == "__main__":
    main()
