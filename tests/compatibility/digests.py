"""``make digests``: the bytes that small runs of every built-in experiment end with.

Before and after a change that means to alter no byte, the output is the same, line by line, on one
machine. Times, hosts and versions are no part of it, nor is what only they change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.training.exactness.reproducibility import child_environment

STAGES = ("segment", "candidates", "evaluate", "export", "promote")
MEASURED = ("manifest.json", "README.md")  # hold times, latencies and versions
RUN_ID = "digests"
SYNTHETIC = "holdfast.training.experiments.turbofan.synthetic"


@dataclass(frozen=True)
class SmallRun:
    """A run that touches what it can in seconds."""

    experiment: str
    overrides: tuple[str, ...]
    needs_engines: bool = False


SMALL_RUNS = (
    SmallRun(
        "digits",
        (
            "train.num_epochs=3",
            "train.num_microbatches=2",
            "train.clip_norm=1.0",
            "warmup.num_steps=5",
            "scheduler.name=CosineAnnealingLR",
            "scheduler.args.T_max=3",
        ),
    ),
    SmallRun("turbofan", ("train.num_epochs=2",), needs_engines=True),
    SmallRun("translation", ("train.num_epochs=1", "train.max_steps=40")),
    SmallRun(
        "language_model",
        (
            "experiment.num_generated=300",
            "experiment.context=16",
            "experiment.width=16",
            "experiment.vocabulary=bpe",
            "experiment.vocabulary_size=300",
            "experiment.positions=rotary",
            "train.num_epochs=2",
            "train.steps_per_epoch=20",
            'export.formats=["weights","onnx"]',
        ),
    ),
)


def main() -> None:
    """Train, choose and export each small run, and print the digest of every file."""
    parser = argparse.ArgumentParser(prog="make digests", description=__doc__)
    parser.add_argument("--only", choices=[run.experiment for run in SMALL_RUNS])
    parser.add_argument("--store", type=Path, help="keep the runs here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-digests-") as name:
        store = arguments.store or Path(name) / "store"
        for small in SMALL_RUNS:
            if arguments.only in (None, small.experiment):
                run = make(small, store, Path(name))
                for path, digest in digests(run).items():
                    print(f"{digest}  {small.experiment}/{path}", flush=True)


def make(small: SmallRun, store: Path, scratch: Path) -> Path:
    """Run all stages; the run's folder."""
    overrides = list(small.overrides)
    if small.needs_engines:
        engines = scratch / "engines"
        python("-m", SYNTHETIC, str(engines))
        overrides.append(f"data.folder={engines}")
    for stage in STAGES:
        options = ["--experiment", small.experiment, "--store", str(store), "--run-id", RUN_ID]
        options += [word for override in overrides for word in ("--set", override)]
        if stage != "segment":
            options.append("--resume")
        python("-m", "holdfast.training", stage, *options, "--progress", "none")
    return store / small.experiment / RUN_ID


def python(*arguments: str) -> None:
    """Run Python with one thread. Raises CalledProcessError, after its own words on stderr."""
    command = [sys.executable, "-P", *arguments]
    environment = {**child_environment(1), "HOLDFAST_REHEARSAL_DEPTH": "none"}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


def digests(run: Path) -> Mapping[str, str]:
    """SHA-256 of all that must not depend on when and where a run was made, by path."""
    found = {}
    for path in sorted(files_of(run)):
        content = path.read_bytes()
        name = path.relative_to(run).as_posix()
        if path.name == "evaluation.json":
            content = without_times(content)
        found[name] = hashlib.sha256(content).hexdigest()
    record = json.loads((run / "run.json").read_text())
    found["run.json config_digest"] = record["config_digest"]
    found["run.json data_fingerprint"] = record["data_fingerprint"]
    return found


def files_of(run: Path) -> Iterator[Path]:
    """Checkpoints and candidates, the choice, and the bundle."""
    for folder in ("checkpoints", "candidates", "bundle"):
        for path in (run / folder).rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name not in MEASURED:
                yield path
    yield run / "evaluation.json"


def without_times(content: bytes) -> bytes:
    """JSON without the keys that tell seconds."""

    def kept(value: object) -> object:
        if isinstance(value, dict):
            return {key: kept(item) for key, item in value.items() if not key.endswith("_s")}
        return [kept(item) for item in value] if isinstance(value, list) else value

    return json.dumps(kept(json.loads(content)), sort_keys=True).encode()


if __name__ == "__main__":
    main()
