"""``replay``: on the command line of ``python -m holdfast.training``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from holdfast.training.configuration.option import SET_OPTION
from holdfast.training.runs.shown_text import shown
from holdfast.training.told_errors import told_errors

EXIT_DIFFERS = 1
HELP = """Do steps of RUN again on this device, and compare the bits of their losses.

The run has kept the loss of each step, to the last bit. Training begins with the newest full
checkpoint before the first of the steps, or with the seed where none is left, and does them as the
run did. A nondeterministic kernel, or a device that computes wrongly now and then, shows. Nothing
of the run is changed: no checkpoint, no record, no lease; it may train meanwhile. What an
experiment or a script writes by itself, it writes again.
"""
EXIT_CODES = (
    "Exit codes: 0 all the same, 1 one differs or training failed, 2 wrong input: steps that the "
    "run has not done or whose losses it has not kept; 75 stopped by a notice or Ctrl-C."
)
STEPS_OPTION = click.option(
    "--steps",
    "steps_text",
    required=True,
    metavar="FIRST:LAST",
    help="Which steps, both included; the first step of a run is 1.",
)
JSON_OPTION = click.option("--json", "is_json", is_flag=True, help="Print JSON, and nothing else.")
EXAMPLES = """
\b
Examples:
  {command} {run} --steps 100:120
  {command} {run} --steps 100:120 --json | jq .difference
"""


@click.command(
    "replay",
    help=HELP + EXAMPLES.format(command="python -m holdfast.training replay", run="runs/gpt/first"),
    epilog=EXIT_CODES,
    short_help="Do steps again, and compare their losses.",
)
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@STEPS_OPTION
@SET_OPTION
@JSON_OPTION
def replay_command(run: Path, steps_text: str, overrides: tuple[str, ...], is_json: bool) -> None:
    """Replay."""
    from holdfast.training.certificate.replaying import replay
    from holdfast.training.replay.comparison import Steps
    from holdfast.training.runs.paths import RunDirectory

    def tell(line: str) -> None:
        click.echo(line, err=True)

    with told_errors():
        steps = Steps.parse(steps_text)
        found = replay(RunDirectory(run.absolute()), steps, overrides, tell, sys.argv[1:])
    if is_json:
        click.echo(json.dumps(found.as_json(), indent=2))
    else:
        for line in found.lines():
            click.echo(shown(line))
    sys.exit(0 if found.is_same else EXIT_DIFFERS)
