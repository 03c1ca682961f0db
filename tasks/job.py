"""What is trained, where: the value that the flow hands from task to task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from holdfast.training.experiment.loading import experiment_name
from holdfast.training.runs.directory import RunDirectory


@dataclass(frozen=True)
class Job:
    """One run, as it was asked for.

    Attributes:
        experiment: row of the table, ``package.module:Class`` or ``path/to/file.py:Class``.
        store: absolute path of the store.
        run_id: name of the run below ``<store>/<experiment>``.
        config_file: absolute path of a TOML file.
        overrides: ``section.key=value``.
        is_resume: take the configuration from ``run.json``; file and overrides go over it.
        is_strict: warnings about exactness are errors.
    """

    experiment: str
    store: Path
    run_id: str
    config_file: Path | None = None
    overrides: tuple[str, ...] = ()
    is_resume: bool = False
    is_strict: bool = False

    @property
    def run(self) -> RunDirectory:
        """Where the run lives."""
        return RunDirectory(self.store / experiment_name(self.experiment) / self.run_id)
