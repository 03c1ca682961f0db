"""What evaluating costs: scoring, of it loading, keeping the records, and the bootstrap.

    python -m benchmarks.evaluation_cost DATA_FOLDER

The models are not trained: what an evaluation costs does not depend on the weights. ``DATA_FOLDER``
holds C-MAPSS; without it, digits alone is measured.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.training.champion.bootstrap import resampled_metrics
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.data.loader import evaluation_batches
from holdfast.training.exactness.reproducibility import set_up_torch
from holdfast.training.experiment.loading import load_experiment, settings_class
from holdfast.training.experiment.protocol import Context, Experiment, Records
from holdfast.training.loop.evaluation import evaluate
from holdfast.training.loop.record_file import RecordFile
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory

BATCH_SIZE = RunConfig().data.evaluation_batch_size
NUM_RESAMPLES = 1000


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    subsets = ["FD001", "FD002"] if folder is not None else []
    set_up_torch("deterministic", num_threads=1)
    print(f"{'test data':<18}{'score s':>10}{'load %':>10}{'keep %':>10}{'1000 resamples s':>20}")
    print(row("digits", build("digits", None)))
    for subset in subsets:
        print(row(f"turbofan {subset}", build("turbofan", folder, subset=subset)))


def build(name: str, folder: Path | None, **settings: Any) -> Experiment:
    found: Any = load_experiment(name)
    experiment: Experiment = found(Context(settings_class(found)(**settings), folder, seed=0))
    return experiment


def row(name: str, experiment: Experiment) -> str:
    model, dataset = experiment.model(), experiment.dataset("test")

    def score() -> Records:
        records = evaluate(experiment, model, dataset, batch_size=BATCH_SIZE)
        assert records is not None
        return records

    records, score_s = timed(score)
    _, load_s = timed(lambda: list(evaluation_batches(dataset, BATCH_SIZE)))
    _, resample_s = timed(
        lambda: resampled_metrics(
            experiment, [records, records], num_resamples=NUM_RESAMPLES, seed=0
        )
    )
    keep_s = seconds_to_keep(records)
    return (
        f"{name:<18}{score_s:>10.2f}{100 * load_s / score_s:>10.2f}{100 * keep_s / score_s:>10.2f}"
        f"{resample_s:>20.2f}"
    )


def seconds_to_keep(records: Records) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        with Lease.acquire(run, ttl_s=20.0) as lease:
            path = run.path / "records.safetensors"

            def keep() -> None:
                RecordFile(path, {}, lease, every_s=0.0).offer([records], is_last=True)

            return timed(keep)[1]


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and how many seconds it took at best of three."""
    times_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        found = action()
        times_s.append(time.perf_counter() - start_s)
    return found, min(times_s)


if __name__ == "__main__":
    main()
