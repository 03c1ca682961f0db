"""What is trained, where, and by which file: the value that the flow hands from task to task."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.training.code.archive import kept_code, unpack_code
from holdfast.training.errors import ExperimentError
from holdfast.training.experiment.loading import experiment_name, is_script, own_file, with_file
from holdfast.training.runs.directory import RunDirectory

OWN_FILES_ONLY = "HOLDFAST_OWN_FILES_ONLY"
"""Set to 1 by a worker that runs no code of a store."""


@dataclass(frozen=True)
class Job:
    """One run, as it was asked for.

    Attributes:
        experiment: row of the table, ``package.module:Class`` or ``path/to/file.py:Class``; for a
            script with its own loop ``name=path/to/train.py``.
        store: absolute path of the store.
        run_id: name of the run below ``<store>/<experiment>``.
        config_file: absolute path of a TOML file.
        overrides: ``section.key=value``.
        is_resume: take the configuration from ``run.json``; file and overrides go over it.
        is_strict: warnings about exactness are errors.
        arguments: of the script.
    """

    experiment: str
    store: Path
    run_id: str
    config_file: Path | None = None
    overrides: tuple[str, ...] = ()
    is_resume: bool = False
    is_strict: bool = False
    arguments: tuple[str, ...] = ()

    @property
    def is_script(self) -> bool:
        """Whether a script trains with its own loop."""
        return is_script(self.experiment)

    @property
    def run(self) -> RunDirectory:
        """Where the run lives."""
        return RunDirectory(self.store / experiment_name(self.experiment) / self.run_id)


def require_code(job: Job) -> None:
    """Make sure that a job's own file is here, or that its run keeps it. Raises InputError."""
    path = own_file(job.experiment)
    if path is None or path.is_file():
        return
    kind = "script" if job.is_script else "experiment file"
    if os.environ.get(OWN_FILES_ONLY) == "1":
        raise ExperimentError(
            f"{kind} {path} does not exist here, and this worker, started with --allow, runs no "
            f"code of a store: put the file there"
        )
    if kept_code(job.run) is None:
        is_begun = job.run.run_json.exists()
        more = f", and {job.run.path} keeps no code" if is_begun else ""
        raise ExperimentError(f"{kind} {path} does not exist{more}; check the path")


@contextmanager
def code_here(job: Job) -> Iterator[Job]:
    """The job with a file that is here: its own, or that of the archive, for as long as the block.

    Raises ExperimentError where there is neither, DataFormatError where the archive was changed.
    """
    path = own_file(job.experiment)
    if path is None or path.is_file():
        yield job
        return
    require_code(job)
    with tempfile.TemporaryDirectory(prefix="holdfast-code-") as folder:
        entry = unpack_code(job.run, Path(folder))
        yield replace(job, experiment=with_file(job.experiment, entry))
