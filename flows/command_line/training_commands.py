"""Run a command of ``python -m holdfast.training`` for a command of ``holdfast``.

The command line must not import torch; what needs it is done by a process that does.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.tasks.run_summary import experiment_reference
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.preemption.passing_on import run_passing_on
from holdfast.training.runs.directory import RunDirectory


def call_training(arguments: list[str]) -> int:
    """Run ``python -m holdfast.training ...`` with this terminal; its exit code."""
    return run_passing_on(python_command("holdfast.training", *arguments))


def run_arguments(run: RunDirectory, overrides: Sequence[str], *, is_json: bool) -> list[str]:
    """What names a run to a command of ``python -m holdfast.training``."""
    told = ["--experiment", experiment_reference(run), "--run-id", run.path.name]
    told += ["--store", str(run.path.absolute().parent.parent)]
    for override in overrides:
        told += ["--set", override]
    return [*told, "--json"] if is_json else told
