"""Write the small store that is kept of a released format, with the code of that release.

In a checkout of it: ``python PATH/write_store.py MODULE FOLDER``, MODULE being what its stages are
called by (``training`` before 0.2, ``holdfast.training`` since). It makes three runs of one
configuration: ``calm`` from seed to published bundle, ``stopped`` by a notice within an epoch, and
``killed`` without one. The tests unpack it and go on with today's code:

    tar --create --xz --file tests/compatibility/stores/VERSION.tar.xz --directory FOLDER .
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SETTINGS = (
    "experiment.width=4",
    "train.num_epochs=3",
    "train.num_microbatches=2",
    "train.clip_norm=1.0",
    "data.batch_size=96",
    "ema.decays=[0.9]",
    "warmup.num_steps=5",
    "scheduler.name=CosineAnnealingLR",
    "scheduler.args.T_max=3",
    "checkpoint.every_steps=4",
    "logging.every_s=0.001",
    "export.num_latency_runs=10",
)
STOPPED_AT_STEP = 17
KILLED_AT_STEP = 22
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HOLDFAST_REHEARSAL_DEPTH": "none"}


def stage_command(module: str, stage: str, store: Path, run_id: str) -> list[str]:
    """A stage of a run of this store."""
    command = [sys.executable, "-m", module, stage, "--experiment", "digits"]
    command += ["--store", str(store), "--run-id", run_id, "--progress", "jsonl"]
    return command + [word for setting in SETTINGS for word in ("--set", setting)]


def write_store(module: str, store: Path) -> None:
    """Make the three runs. Raises CalledProcessError where a stage fails."""
    environment = {**os.environ, **ENVIRONMENT}
    for stage in ("segment", "candidates", "evaluate", "export", "promote", "report"):
        subprocess.run(
            stage_command(module, stage, store, "calm"),
            env=environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    stop_at(module, store, "stopped", STOPPED_AT_STEP, signal.SIGTERM)
    stop_at(module, store, "killed", KILLED_AT_STEP, signal.SIGKILL)


def stop_at(module: str, store: Path, run_id: str, step: int, number: signal.Signals) -> None:
    """Train until a step is told, then send a signal."""
    command = stage_command(module, "segment", store, run_id)
    with subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "progress" and event["step"] >= step:
                process.send_signal(number)
                break
        process.stdout.read()
    assert process.returncode in (75, -number), process.returncode


if __name__ == "__main__":
    write_store(sys.argv[1], Path(sys.argv[2]).absolute())
