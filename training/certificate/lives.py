"""Process lives of a training on trial: how each is started, and how long it may take."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from holdfast.training.errors import ExperimentError, InputError
from holdfast.training.exactness.reproducibility import (
    FILLED_MEMORY,
    child_environment,
    python_command,
)
from holdfast.training.exactness.trial import Trial
from holdfast.training.experiment.loading import experiment_name, located_reference
from holdfast.training.own_loop.environment import RUN_ID, STORE
from holdfast.training.runs.directory import RunRecord, read_run_record
from holdfast.training.runs.durable_json import create_json_durably
from holdfast.training.runs.paths import RunDirectory


class BudgetOverError(Exception):
    """The seconds that were given are over."""


@dataclass(frozen=True)
class Target:
    """What is tried: an experiment, or a script with its arguments.

    Attributes:
        config_file, overrides: of the experiment.
        record: of the run whose experiment or script it is, with its configuration and seeds.
    """

    experiment: str | None = None
    config_file: Path | None = None
    overrides: tuple[str, ...] = ()
    script: tuple[str, ...] = ()
    record: RunRecord | None = None

    @staticmethod
    def of_run(run: RunDirectory) -> Target:
        """What a run trains. Raises InputError where it is not there, or its script is not."""
        try:
            record = read_run_record(run)
        except FileNotFoundError:
            raise InputError(f"there is no run at {run.path}") from None
        if record.script is None:
            reference = located_reference(record.experiment, record.folder)
            return Target(experiment=reference, record=record)
        if not Path(record.script.path).is_file():
            raise InputError(
                f"the run's script {record.script.path} is not here: try it where it is, or put it "
                f"there"
            )
        return Target(script=(record.script.path, *record.script.arguments), record=record)

    @property
    def folder(self) -> str | None:
        """Where its script is started; None for here."""
        begun = None if self.record is None else self.record.folder
        return begun if self.script and begun and Path(begun).is_dir() else None

    def plant(self, run: RunDirectory) -> None:
        """Let a life of an experiment find the configuration and seeds of the run that is meant."""
        if self.record is None or self.experiment is None or run.run_json.exists():
            return
        run.path.mkdir(parents=True)
        planted = self.record.model_copy(update={"run_id": run.path.name, "lineage": None})
        create_json_durably(run.run_json, planted.model_dump(mode="json"))

    @property
    def name(self) -> str:
        """For people."""
        return self.experiment or " ".join(self.script)

    def command(self, store: Path, run_id: str, trial: Trial) -> list[str]:
        """The command line of one life."""
        if self.experiment is None:
            python = sys.executable  # as users start it: what lies beside a script is found
            return [python, *self.script]
        asked = ["--experiment", self.experiment, "--store", str(store), "--run-id", run_id]
        given = {**trial.settings(), "rehearsal.depth": "none"}
        if trial.num_workers is not None:
            given["data.num_workers"] = trial.num_workers
        told = [f"{key}={str(value).lower()}" for key, value in given.items() if value is not None]
        for override in (*told, *self.overrides):
            asked += ["--set", override]
        if self.config_file is not None:
            asked += ["--config", str(self.config_file)]
        if self.record is not None:
            asked.append("--resume")
        return python_command("holdfast.training", "segment", *asked, "--progress", "none")


@dataclass
class Lives:
    """Starts lives in a store of their own, within a budget.

    Attributes:
        num_threads: CPU threads of each.
    """

    target: Target
    store: Path
    num_threads: int
    budget_s: float
    _begun_s: float = field(default_factory=time.monotonic)

    def live(self, run_id: str, trial: Trial) -> int:
        """One process life; its exit code. Raises BudgetOverError, or ExperimentError if it fails.

        A life that stops itself ends by SIGKILL, or with 75.
        """
        left_s = self.budget_s - (time.monotonic() - self._begun_s)
        if left_s <= 0:
            raise BudgetOverError
        environment = {
            **child_environment(self.num_threads),
            **trial.environment(),
            **FILLED_MEMORY,
            STORE: str(self.store),
            RUN_ID: run_id,
        }
        if self.target.experiment is not None:
            self.target.plant(self.run(run_id))
        log_path = self.store / f"{run_id}.log"
        with log_path.open("ab") as log:
            command = self.target.command(self.store, run_id, trial)
            code = _wait(command, environment, log, left_s, self.target.folder)
        expected = (0, 75) if trial.stop_at is None else (0, 75, -signal.SIGKILL)
        if code not in expected:
            raise ExperimentError(
                f"{self.target.name} does not train by itself: it ended with exit code {code}: "
                f"{_last_words(log_path)}"
            )
        return code

    def run(self, run_id: str) -> RunDirectory:
        """The run that lives of this id have written."""
        if self.target.experiment is not None:
            return RunDirectory(self.store / experiment_name(self.target.experiment) / run_id)
        found = sorted(self.store.glob(f"*/{run_id}"))
        if len(found) != 1:
            raise ExperimentError(
                f"{self.target.name} wrote no run: it has to call holdfast.run, and to take steps "
                f"from run.steps or run.epochs"
            )
        return RunDirectory(found[0])


def chosen_stops(num_steps: int, num_stops: int, seed: int) -> list[tuple[int, str]]:
    """Steps to stop after, ascending, with signals by turns; several lie within one epoch."""
    rng = random.Random(seed)
    places = range(1, num_steps)
    steps = sorted(rng.sample(places, min(num_stops, len(places))))
    return [(step, ("SIGKILL", "SIGTERM")[number % 2]) for number, step in enumerate(steps)]


def _wait(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: IO[bytes],
    left_s: float,
    folder: str | None,
) -> int:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        code: int = process.wait(timeout=left_s)
    except subprocess.TimeoutExpired:
        raise BudgetOverError from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code


def _last_words(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")
