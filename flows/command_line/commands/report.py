"""``holdfast report``."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext

import click

from holdfast.flows.command_line.options import JSON_OPTION, STORE_OPTION
from holdfast.flows.command_line.stores import find_run, reading_store, written_store
from holdfast.tasks.child import StageCommand
from holdfast.tasks.job import Job, code_here
from holdfast.tasks.run_summary import experiment_reference
from holdfast.training.errors import InputError
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.tiers.keeping import kept_up, opened_replica
from holdfast.training.tiers.scratch import told_path
from holdfast.training.tiers.viewing import REPORT

HELP = """Write a run's report again, and say where it is.

It runs the experiment's code, which run.json names: ask for reports of stores that you trust. With
--read nothing is run: the report that is there is read, of a bucket that file alone.

\b
Examples:
  holdfast report digits-20260131-030000
  xdg-open "$(holdfast report turbofan/fd001 --store /mnt/runs)"
  holdfast report first --read --store s3://my-bucket/runs
"""


@click.command(
    "report",
    help=HELP,
    epilog="Exit codes: 0 written, 75 stopped by a notice, 2 wrong input, 1 failed.",
    short_help="Write a run's report again, and say where.",
)
@click.argument("run")
@click.option("--read", "is_read", is_flag=True, help="Only read the report that is there.")
@STORE_OPTION
@JSON_OPTION
def command(run: str, is_read: bool, store: str, is_json: bool) -> int:
    """Write it."""
    if is_read:
        found = find_run(reading_store(store, run, also=(REPORT,)), run)
        if not found.report_html.is_file():
            raise InputError(f"{told_path(found.path)} has no report yet; leave --read out")
        _tell(found, is_json)
        return 0
    directory = find_run(reading_store(store, run), run)
    asked = Job(
        experiment=experiment_reference(directory),
        store=written_store(directory),
        run_id=directory.path.name,
        is_resume=True,
    )
    # What a script has to say stands in its run: nothing of it is run.
    code = nullcontext(asked) if asked.is_script else code_here(asked)
    with opened_replica(asked.run) as replica, kept_up(replica), code as job:
        argv = StageCommand("report", job).argv()
        written = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=sys.stderr, check=False)
    if written.returncode == 0:
        _tell(job.run, is_json)
    return written.returncode


def _tell(run: RunDirectory, is_json: bool) -> None:
    path = str(run.report_html.absolute())
    click.echo(json.dumps({"report": path}) if is_json else path)
