"""``holdfast copy``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from holdfast.flows.command_line.options import EXIT_CODES, JSON_OPTION, STORE_OPTION
from holdfast.flows.command_line.stores import find_run, full_name, reading_store, written_store
from holdfast.tasks.preflight import require_writable, store_path
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.shown_text import shown
from holdfast.training.tiers.bandwidth import told_size
from holdfast.training.tiers.scratch import told_store
from holdfast.training.upkeep.copying import copy_run

HELP = """Copy RUN to another store, TARGET, under the same name: folder or bucket, either way.

All of it goes: checkpoints, candidates, bundle, report, records. There it is resumed, reported and
promoted as here, to the same bytes. Nobody writes the run meanwhile, neither here nor there; every
byte is verified, and the run is there as a whole or not at all. Interrupted, the same command goes
on where it stood. What is here stays.

\b
Examples:
  holdfast copy first s3://my-bucket/runs
  holdfast copy digits/first /mnt/runs --store s3://my-bucket/runs
"""


@click.command("copy", help=HELP, epilog=EXIT_CODES, short_help="Copy a run to another store.")
@click.argument("run")
@click.argument("target")
@STORE_OPTION
@JSON_OPTION
def command(run: str, target: str, store: str, is_json: bool) -> None:
    """Copy."""
    seen = find_run(reading_store(store, run), run)
    source = RunDirectory(written_store(seen) / full_name(seen))
    folder = store_path(target)
    require_writable(folder)
    done = copy_run(source, folder, lambda line: click.echo(shown(line), err=True))
    place = f"{told_store(folder)}/{full_name(seen)}"
    if is_json:
        click.echo(json.dumps({"run": place, **asdict(done)}, indent=2))
        return
    size = told_size(done.num_bytes)
    click.echo(
        shown(f"{place} has {done.num_files} files, {size}, all verified; {done.num_new} were new")
    )
