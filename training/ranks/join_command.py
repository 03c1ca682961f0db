"""The command ``join`` of ``python -m holdfast.training``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from holdfast.training.configuration.option import NumberRange
from holdfast.training.errors import HoldfastError
from holdfast.training.preemption.signals import hold_signals
from holdfast.training.runs.shown_text import ShownFormatter
from holdfast.training.storage.address import is_address, parse_address
from holdfast.training.told_errors import error_line

HELP = """Let this machine take part in a run of several machines.

RUN is started on one machine, with distributed.max_machines=2 or more; there lie its lease and its
checkpoints. Here its ranks are started when it starts, and end when it stops; then its next start
is waited for, until it is trained. The configuration comes from the machine that starts the run.
Of this machine it needs the same versions, the same data at the same path, the file of the
experiment at the same path as seen from this folder, and the same --store: a folder that all
machines see, or a bucket. All ports between the machines must be open. At a first Ctrl-C or SIGTERM
the run saves and stops on all machines after the same step; the others go on without this one.
"""
EXAMPLES = """
\b
Examples:
  {command} first --store /mnt/runs
  {command} digits/first --store s3://my-bucket/runs
  HOLDFAST_ADDRESS=10.0.0.7 {command} first      over the network that this address belongs to
"""
EXIT_CODES = (
    "Exit codes: 0 the run is trained, 75 this machine goes away, 2 wrong input, 1 failed, or not "
    "started for --max-wait-s."
)
MAX_WAIT_OPTION = click.option(
    "--max-wait-s",
    type=NumberRange(min=0, min_open=True),
    default=float("inf"),
    help="Leave when the run is not started for so long; waits as long as it takes unless given.",
)


@click.command(
    "join",
    help=HELP + EXAMPLES.format(command="python -m holdfast.training join"),
    epilog=EXIT_CODES,
)
@click.argument("run")
@click.option("--store", required=True, help="Folder that holds all runs, or a bucket's address.")
@MAX_WAIT_OPTION
def join_command(run: str, store: str, max_wait_s: float) -> None:
    """Join."""
    hold_signals()
    # That a meeting is over is no error, and torch tells it with a stack.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from holdfast.training.ranks.joining import Joined, join

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShownFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        place = parse_address(store) if is_address(store) else Path(store).expanduser().absolute()
        sys.exit(join(Joined.in_store(place, run), max_wait_s))
    except HoldfastError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(error.exit_code)
