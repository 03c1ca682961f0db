"""``holdfast replay``."""

from __future__ import annotations

import click

from holdfast.flows.command_line.options import STORE_OPTION
from holdfast.flows.command_line.stores import find_run
from holdfast.flows.command_line.training_commands import call_training
from holdfast.tasks.preflight import store_path
from holdfast.training.certificate.replay_command import (
    EXAMPLES,
    EXIT_CODES,
    HELP,
    JSON_OPTION,
    STEPS_OPTION,
)
from holdfast.training.configuration.option import SET_OPTION


@click.command(
    "replay",
    help=HELP + EXAMPLES.format(command="holdfast replay", run="gpt/first"),
    epilog=EXIT_CODES,
    short_help="Do steps again, and compare their losses.",
)
@click.argument("run")
@STEPS_OPTION
@SET_OPTION
@STORE_OPTION
@JSON_OPTION
def command(
    run: str, steps_text: str, overrides: tuple[str, ...], store: str, is_json: bool
) -> int:
    """Replay."""
    found = find_run(store_path(store), run)
    arguments = [str(found.path.absolute()), "--steps", steps_text]
    for override in overrides:
        arguments += ["--set", override]
    return call_training(["replay", *arguments, *(["--json"] if is_json else [])])
