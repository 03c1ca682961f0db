"""``holdfast exec``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from holdfast.flows.command_line.options import STRICT_OPTION
from holdfast.tasks.limits import Limits
from holdfast.tasks.scripts.repeated import ScriptRunner, script_command
from holdfast.training.exactness.reproducibility import child_environment, default_num_threads
from holdfast.training.own_loop.environment import ALLOW_MISMATCH, IS_STRICT, RUN_ID, STORE
from holdfast.training.tiers.scratch import parsed_store

HELP = """Start a training script of your own, and start it again until it has completed.

SCRIPT is a Python file that calls `holdfast.run` and keeps its own loop; what follows it are its
own arguments. What has to be set before Python starts is set: hash seed, threads, cuBLAS. Signals
are passed on: at a first Ctrl-C or SIGTERM the script saves and exits with 75, and so does this
command. A script that was preempted while this machine stays, that crashed or was killed is started
again, and goes on from its newest checkpoint: any number of preemptions as long as there is
progress, and --max-crashes crashes in a row without any. What every start would end with is final:
wrong input, a program that cannot be read or imported, a loop that ends before its steps do.

\b
Examples:
  holdfast exec train.py --lr 0.1
  holdfast exec --store /mnt/runs --run-id second train.py
  holdfast exec --store s3://my-bucket/runs train.py
  holdfast exec -m my_project.train          a module, as python -m
"""


@click.command(
    "exec",
    help=HELP,
    epilog="Exit codes: 0 completed, 75 stopped by a notice, and saved: run it again, 2 wrong "
    "input, else what the script ended with, 128 + the signal where it was killed.",
    short_help="Start a training script, again and again.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "--store", help="Folder or address of the store of all runs, in the place of the script's."
)
@click.option("--run-id", help="Name of the run, in the place of the script's.")
@STRICT_OPTION
@click.option(
    "--allow-mismatch",
    "is_mismatch_allowed",
    is_flag=True,
    help="Go on with another `config` or other settings than the run had so far, and keep to them "
    "from there on; also from checkpoints that were copied into this run's folder.",
)
@click.option(
    "--max-crashes",
    type=click.IntRange(min=0),
    default=Limits().max_crashes,
    show_default=True,
    help="Crashes in a row, without progress between them, after which it is not started again.",
)
@click.argument("script", nargs=-1, required=True, type=click.UNPROCESSED)
def command(  # one per option
    store: str | None,
    run_id: str | None,
    is_strict: bool,
    is_mismatch_allowed: bool,
    max_crashes: int,
    script: tuple[str, ...],
) -> int:
    """Start it."""
    command_line = script_command(script, sys.executable)
    asked = {
        STORE: _place(store) if store else None,
        RUN_ID: run_id,
        IS_STRICT: "1" if is_strict else None,
        ALLOW_MISMATCH: "1" if is_mismatch_allowed else None,
    }
    environment = child_environment(default_num_threads())
    environment |= {name: value for name, value in asked.items() if value is not None}
    limits = Limits(max_crashes=max_crashes)
    return ScriptRunner(
        command_line, environment, limits, lambda line: click.echo(line, err=True)
    ).run()


def _place(store: str) -> str:
    """A store as the script finds it, wherever it stands. Raises InputError for a wrong address."""
    address = parsed_store(store)
    return str(Path(store).absolute()) if address is None else str(address)
