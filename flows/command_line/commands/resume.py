"""``holdfast resume``."""

from __future__ import annotations

import click

from holdfast.flows.command_line.commands.run import run_job
from holdfast.flows.command_line.options import (
    JSON_OPTION,
    RUN_EXIT_CODES,
    STORE_OPTION,
    STRICT_OPTION,
)
from holdfast.flows.command_line.stores import find_run, reading_store, written_store
from holdfast.tasks.job import Job
from holdfast.tasks.run_summary import experiment_reference

HELP = """Go on with a run that was stopped or failed.

RUN is a run id, experiment/run_id, or the run's directory. The configuration is the one that the
run was begun with; values that do not change the result may be overridden.

\b
Examples:
  holdfast resume digits-20260131-030000
  holdfast resume turbofan/fd001 --store /mnt/runs --set data.folder=/other/cmapss
"""


@click.command(
    "resume",
    help=HELP,
    epilog=RUN_EXIT_CODES,
    short_help="Go on with a run that was stopped or failed.",
)
@click.argument("run")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="As in run.")
@STORE_OPTION
@STRICT_OPTION
@JSON_OPTION
def command(
    run: str, overrides: tuple[str, ...], store: str, is_strict: bool, is_json: bool
) -> int:
    """Go on."""
    directory = find_run(reading_store(store, run), run)
    job = Job(
        experiment=experiment_reference(directory),
        store=written_store(directory),
        run_id=directory.path.name,
        overrides=overrides,
        is_resume=True,
        is_strict=is_strict,
    )
    return run_job(job, is_json=is_json)
