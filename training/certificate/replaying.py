"""Steps of a run, done again in a process that has the run's own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.exactness.reproducibility import (
    child_environment,
    default_num_threads,
    is_environment_ready,
    python_command,
)
from holdfast.training.exactness.trial import Trial
from holdfast.training.experiment.loading import located_reference
from holdfast.training.own_loop.environment import RUN_ID, STORE
from holdfast.training.preemption.passing_on import run_passing_on
from holdfast.training.preemption.signals import install_signal_flag
from holdfast.training.replay.comparison import Replayed, Steps, require_kept
from holdfast.training.runs.directory import RunRecord, Script, read_run_record, read_segments
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.stage import EXIT_PREEMPTED, NoticeCameError, StageArguments

Tell = Callable[[str], None]


def replay(
    run: RunDirectory, steps: Steps, overrides: tuple[str, ...], tell: Tell, arguments: list[str]
) -> Replayed:
    """Do steps of a run again, on this device, and compare their losses with those kept.

    Nothing of the run is changed. ``arguments`` start this process anew, where its environment is
    another than the run's. Raises InputError, HoldfastError for what goes wrong in training, and
    NoticeCameError for a signal.
    """
    try:
        record = read_run_record(run)
    except FileNotFoundError:
        raise InputError(f"there is no run at {run.path}") from None
    require_kept(run, steps)
    _require_one_device(run, record)
    num_threads = record.num_threads or default_num_threads()
    if record.script is not None:
        if overrides:
            raise InputError("--set is of experiments; a script has its own arguments")
        return _replay_script(run, record, record.script, steps, num_threads)
    if not is_environment_ready(num_threads):
        command = python_command("holdfast.training", *arguments)
        os.execve(command[0], command, child_environment(num_threads))
    install_signal_flag()
    from holdfast.training.replay.experiment import replay_experiment

    return replay_experiment(_arguments(run, record, overrides, num_threads), steps, tell)


def _require_one_device(run: RunDirectory, record: RunRecord) -> None:
    """Raise InputError where one device does not add up as the run's processes did."""
    num_processes = max((one.num_processes or 1 for one in read_segments(run)), default=1)
    if num_processes > 1 and not record.config.get("distributed", {}).get("num_shards"):
        raise InputError(
            f"{run.path} trained in {num_processes} processes without distributed.num_shards: one "
            f"device adds their gradients up in another order, and no bits are to be expected; a "
            f"run with distributed.num_shards can be replayed"
        )


def _arguments(
    run: RunDirectory, record: RunRecord, overrides: tuple[str, ...], num_threads: int
) -> StageArguments:
    return StageArguments(
        experiment=located_reference(record.experiment, record.folder),
        store=run.path.absolute().parent.parent,
        run_id=run.path.name,
        num_threads=num_threads,
        overrides=overrides,
        is_resume=True,
    )


def _replay_script(
    run: RunDirectory, record: RunRecord, script: Script, steps: Steps, num_threads: int
) -> Replayed:
    if not Path(script.path).is_file():
        raise InputError(
            f"the run's script {script.path} is not here: replay where it is, or put it there"
        )
    folder = record.folder if record.folder and Path(record.folder).is_dir() else None
    with tempfile.TemporaryDirectory(prefix="holdfast-replay-") as scratch:
        result = Path(scratch) / "replayed.json"
        trial = Trial(replay_steps=(steps.first, steps.last), replay_file=str(result))
        environment = {
            **child_environment(num_threads),
            **trial.environment(),
            STORE: str(run.path.absolute().parent.parent),
            RUN_ID: run.path.name,
        }
        python = sys.executable  # as users start it: what lies beside a script is found
        code = run_passing_on(
            [python, script.path, *script.arguments],
            environment,
            folder,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # all that a script says: standard output is for the result
        )
        if code == EXIT_PREEMPTED:
            raise NoticeCameError(None)
        if code == InputError.exit_code:
            raise InputError(f"{script.path} did not begin: what it said stands above")
        if code != 0 or not result.exists():
            raise HoldfastError(
                f"{script.path} ended with exit code {code}, and had not replayed step "
                f"{steps.last}: what it said stands above"
            )
        return Replayed.from_json(json.loads(result.read_text()))
