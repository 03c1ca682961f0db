"""Time and memory of export, parity, latency and bundle: digits and turbofan in one run.

    python -m benchmarks.export_cost DATA_FOLDER

The models are not trained: what an export costs does not depend on the weights. ``DATA_FOLDER``
holds C-MAPSS; without it, digits alone is measured.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training.durable_json import write_json_durably
from training.export.consumer import file_digest, read_manifest

NUM_THREADS = "1"


def main() -> None:
    has_data = len(sys.argv) > 1
    cases = [("digits", ""), *([("turbofan", sys.argv[1])] if has_data else [])]
    print(f"{'experiment':<12}{'weights MB':>12}{'bundle MB':>12}{'seconds':>10}{'peak MB':>10}")
    with tempfile.TemporaryDirectory() as store:
        for name, folder in cases:
            print(row(Path(store), name, folder))


def row(store: Path, name: str, folder: str) -> str:
    run = store / name / "cost"
    options = [f"data.folder='{folder}'"] if folder else []
    choose_untrained(run, name, folder)
    command = [sys.executable, "-m", "training", "export", "--experiment", name]
    command += ["--store", str(store), "--run-id", "cost", "--progress", "none"]
    command += [word for option in options for word in ("--set", option)]
    start_s = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": NUM_THREADS})
    duration_s = time.perf_counter() - start_s
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    manifest = read_manifest(run / "bundle")
    weights_mb = manifest["formats"]["weights"]["size_bytes"] / 1e6
    bundle_mb = sum(entry["size_bytes"] for entry in manifest["files"].values()) / 1e6
    return f"{name:<12}{weights_mb:>12.2f}{bundle_mb:>12.2f}{duration_s:>10.1f}{peak_mb:>10.0f}"


def choose_untrained(run: Path, name: str, folder: str) -> None:
    """A champion as the evaluation leaves it, made in a process of its own."""
    path = run / "candidates/untrained/model.safetensors"
    path.parent.mkdir(parents=True)
    code = (
        "import sys, torch; from pathlib import Path;"
        "from safetensors.torch import save_file; from training.experiment import Context;"
        "from training.experiment_loading import *;"
        "c = load_experiment(sys.argv[1]); torch.manual_seed(0);"
        "e = c(Context(settings_class(c)(), Path(sys.argv[2]) if sys.argv[2] else None, 0));"
        "save_file(e.model().state_dict(), sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", code, name, folder, str(path)], check=True)
    champion = {
        "digest": file_digest(path),
        "metrics": {},
        "name": "untrained",
        "path": path.relative_to(run).as_posix(),
    }
    write_json_durably(run / "evaluation.json", {"champion": champion})


if __name__ == "__main__":
    main()
