"""``holdfast evaluate``."""

from __future__ import annotations

import click

from holdfast.flows.command_line.options import JSON_OPTION, STORE_OPTION
from holdfast.flows.command_line.stores import find_run, reading_store
from holdfast.flows.command_line.training_commands import call_training, run_arguments
from holdfast.training.beginnings.commands import AT_HELP, SCORE_EXIT_CODES
from holdfast.training.configuration.option import SET_OPTION

HELP = """Score one checkpoint of RUN on validation data; of kind full or weights.

Nothing of the run is changed, and it may train meanwhile. What was recorded when the checkpoint
was saved is shown where it is another value. Test data is not opened: it is for the champion, once.

\b
Examples:
  holdfast evaluate digits-20260131-030000 --step 420
  holdfast evaluate turbofan/fd001 --step best --store /mnt/runs
  holdfast evaluate first --json | jq .metrics
"""


@click.command(
    "evaluate",
    help=HELP,
    epilog=SCORE_EXIT_CODES,
    short_help="Score one checkpoint on validation data.",
)
@click.argument("run")
@click.option(
    "--step",
    "at",
    default="latest",
    show_default=True,
    metavar="STEP|best|latest",
    help=AT_HELP,
)
@SET_OPTION
@STORE_OPTION
@JSON_OPTION
def command(run: str, at: str, overrides: tuple[str, ...], store: str, is_json: bool) -> int:
    """Score."""
    arguments = run_arguments(find_run(reading_store(store, run), run), overrides, is_json=is_json)
    return call_training(["score", *arguments, "--step", at])
