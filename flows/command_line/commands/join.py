"""``holdfast join``."""

from __future__ import annotations

import click

from holdfast.flows.command_line.options import STORE_OPTION
from holdfast.flows.command_line.training_commands import call_training
from holdfast.tasks.preflight import store_path
from holdfast.training.ranks.join_command import EXAMPLES, EXIT_CODES, HELP, MAX_WAIT_OPTION
from holdfast.training.tiers.scratch import told_store


@click.command(
    "join",
    help=HELP + EXAMPLES.format(command="holdfast join"),
    epilog=EXIT_CODES,
    short_help="Let this machine take part in a run.",
)
@click.argument("run")
@STORE_OPTION
@MAX_WAIT_OPTION
def command(run: str, store: str, max_wait_s: float) -> int:
    """Join."""
    place = told_store(store_path(store))
    return call_training(["join", run, "--store", place, "--max-wait-s", str(max_wait_s)])
