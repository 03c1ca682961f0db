"""``holdfast promote``."""

from __future__ import annotations

import subprocess

import click

from holdfast.flows.command_line.options import STORE_OPTION
from holdfast.flows.command_line.stores import find_run, reading_store, written_store
from holdfast.tasks.job import Job, code_here
from holdfast.tasks.run_summary import experiment_reference
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.tiers.keeping import kept_up, opened_replica

HELP = """Publish a run's bundle; it takes the alias champion if it is not worse than the holder.

Both models answer the same test data; section [promotion] of the configuration says how much worse
is too much. A bundle with other inputs or outputs than the holder's does not take it by itself:
holdfast alias moves it. A bundle that does not take the alias is kept under its version. A run
decides once, at its end; this command decides again. It runs the experiment's code, which
run.json names: promote runs of stores that you trust.

\b
Examples:
  holdfast promote digits-20260131-030000
  holdfast promote turbofan/fd001 --store /mnt/runs
"""


@click.command(
    "promote",
    help=HELP,
    epilog="Exit codes: 0 decided either way, 75 stopped by a notice, 2 wrong input, 1 failed.",
    short_help="Publish a run's bundle, and let it win or not.",
)
@click.argument("run")
@STORE_OPTION
def command(run: str, store: str) -> int:
    """Promote it."""
    directory = find_run(reading_store(store, run), run)
    asked = Job(
        experiment=experiment_reference(directory),
        store=written_store(directory),
        run_id=directory.path.name,
    )
    with opened_replica(asked.run) as replica, kept_up(replica), code_here(asked) as job:
        argv = python_command("holdfast.training", "promote", "--resume", "--again")
        argv += ["--experiment", job.experiment, "--run-id", job.run_id]
        argv += ["--store", str(job.store)]
        return subprocess.run(argv, check=False).returncode
