"""What averaging is worth: every candidate of several seeds on test data, beside the single best.

Each seed is a run of its own: it is trained, its candidates are made, and its champion is chosen
on validation data, by the stages that everybody uses. Only then, and only here, all candidates
meet the test data; a run's own evaluation tests the champion and the single best alone.

    python benchmarks/candidates_compared.py --experiment digits --seeds 3 --metric loss
    python benchmarks/candidates_compared.py --experiment turbofan --set data.folder=CMAPSS \\
        --set experiment.subset=FD002 --metric rmse_capped --metric rmse_raw --store runs

With ``--store``, runs that are there already are not trained again, and unfinished ones go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from interleaving import markdown_table
from torch import nn

from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.model_weights import load_model
from holdfast.training.checkpointing.tensor_file import parse_tensors
from holdfast.training.configuration.schema import Split
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.experiment.protocol import Dataset, concatenate
from holdfast.training.loop.evaluation import evaluate
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.stage import EXIT_PREEMPTED, Stage, StageArguments, prepared_stage

STAGES = ("segment", "candidates", "evaluate")


@dataclass(frozen=True)
class Seed:
    """One run's test metrics by candidate, simplest first, its champion and its training time."""

    metrics: dict[str, dict[str, float]]
    champion: str
    single_best: str
    training_s: float


def finish(command: Sequence[str], num_threads: int) -> None:
    """Run a stage until it is completed."""
    while True:
        code = subprocess.run(command, env=child_environment(num_threads), check=False).returncode
        if code == 0:
            return
        if code != EXIT_PREEMPTED:
            raise SystemExit(f"exit code {code} of {' '.join(command)}")


def measure(arguments: argparse.Namespace, store: Path, seed: int) -> Seed:
    """Train, choose, and then measure every candidate on test data."""
    overrides = (
        *arguments.overrides,
        f"seed={seed}",
        f"train.num_threads={arguments.num_threads}",
    )
    run_id = f"{arguments.name}-seed-{seed}"
    options = ["--experiment", arguments.experiment, "--store", str(store), "--run-id", run_id]
    options += ["--progress", "none"]
    options += ["--config", str(arguments.config)] if arguments.config else []
    options += [part for override in overrides for part in ("--set", override)]
    run = RunDirectory(store / experiment_name(arguments.experiment) / run_id)
    for stage in () if run.evaluation_json.exists() else STAGES:
        finish([sys.executable, "-m", "holdfast.training", stage, *options], arguments.num_threads)
    stage_arguments = StageArguments(
        experiment=arguments.experiment,
        store=store,
        run_id=run_id,
        num_threads=arguments.num_threads,
        config_file=arguments.config,
        overrides=overrides,
        progress_format="none",
    )
    with prepared_stage(stage_arguments) as prepared:
        return test_all(prepared, arguments.splits or ["test"])


def test_all(stage: Stage, splits: Sequence[Split]) -> Seed:
    """Every candidate of a finished evaluation on test data, or on several splits together."""
    evaluation = json.loads(stage.run.evaluation_json.read_text())
    datasets = [stage.experiment.dataset(split) for split in splits]
    model = stage.experiment.model()
    return Seed(
        {
            entry["name"]: test(stage, model, datasets, stage.run.path / entry["path"])
            for entry in evaluation["candidates"]
        },
        evaluation["champion"]["name"],
        evaluation["single_best"],
        sum(segment.costs_s.get("useful", 0.0) for segment in read_segments(stage.run)),
    )


def test(
    stage: Stage, model: nn.Module, datasets: Sequence[Dataset], weights: Path
) -> dict[str, float]:
    """Test metrics of one candidate."""
    content, _ = read_file(weights, "sha256", None)
    load_model(model, parse_tensors(content, str(weights)))
    batch_size = stage.config.data.evaluation_batch_size
    parts = []
    for dataset in datasets:
        records = evaluate(stage.experiment, model, dataset, batch_size=batch_size)
        assert records is not None
        parts.append(records)
    metrics = stage.experiment.metrics(concatenate(parts))
    return {name: float(value) for name, value in metrics.items()}


def table(seeds: Sequence[Seed], metric: str, is_more_better: bool) -> str:
    """A row for each candidate that every seed has, one for the champion, and one for what is no
    result: in each seed the candidate that test data likes best.
    """
    common = [name for name in seeds[0].metrics if all(name in seed.metrics for seed in seeds)]
    rows = [row(name, seeds, [name] * len(seeds), metric, is_more_better) for name in common]
    champions = [seed.champion for seed in seeds]
    rows.append(row("**champion**", seeds, champions, metric, is_more_better))
    luckiest = [luckiest_on_test(seed, common, metric, is_more_better) for seed in seeds]
    rows.append(row("*had test data chosen*", seeds, luckiest, metric, is_more_better))
    header = [f"candidate, n = {len(seeds)}", metric, "minus single best", "better", "chosen"]
    return markdown_table(header, rows)


def luckiest_on_test(seed: Seed, names: Sequence[str], metric: str, is_more_better: bool) -> str:
    """The candidate that wins where test data choose, which they must not."""
    better = max if is_more_better else min
    return better(names, key=lambda name: seed.metrics[name][metric])


def row(
    title: str, seeds: Sequence[Seed], names: Sequence[str], metric: str, is_more_better: bool
) -> list[str]:
    """Mean and standard deviation over the seeds, and how often it beat the single best."""
    values = [seed.metrics[name][metric] for seed, name in zip(seeds, names, strict=True)]
    best = [seed.metrics[seed.single_best][metric] for seed in seeds]
    gains = [value - single for value, single in zip(values, best, strict=True)]
    num_better = sum((gain > 0) if is_more_better else (gain < 0) for gain in gains)
    num_chosen = sum(seed.champion == name for seed, name in zip(seeds, names, strict=True))
    return [
        title,
        spread(values, ".4f"),
        spread(gains, "+.4f"),
        f"{num_better} of {len(seeds)}",
        str(num_chosen),
    ]


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def main() -> None:
    """Print a table for each metric."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--metric",
        dest="metrics",
        action="append",
        default=[],
        metavar="NAME[:max]",
        help="less is better, unless the name ends with ':max'",
    )
    parser.add_argument(
        "--split",
        dest="splits",
        action="append",
        choices=["validation", "test"],
        help="measure on this, may be repeated; default: test",
    )
    parser.add_argument("--name", default="compared", help="what run ids begin with")
    parser.add_argument("--store", type=Path, help="keep the runs there")
    parser.add_argument("--num-threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = arguments.store or Path(folder)
        seeds = [measure(arguments, store, seed) for seed in range(arguments.seeds)]
    for metric in arguments.metrics or ["loss"]:
        name, _, mode = metric.partition(":")
        print(table(seeds, name, mode == "max"), end="\n\n")
    training = ", ".join(f"{seed.training_s:.0f}" for seed in seeds)
    print(f"Training took {training} s.")


if __name__ == "__main__":
    main()
