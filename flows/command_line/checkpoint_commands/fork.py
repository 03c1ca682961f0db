"""``holdfast fork``."""

from __future__ import annotations

from pathlib import Path

import click

from holdfast.flows.command_line.options import JSON_OPTION, STORE_OPTION
from holdfast.flows.command_line.stores import find_run, reading_store, written_store
from holdfast.flows.command_line.training_commands import call_training, run_arguments
from holdfast.training.beginnings.commands import AT_HELP, FORK_EXIT_CODES
from holdfast.training.configuration.option import CONFIG_OPTION, SET_OPTION
from holdfast.training.runs.paths import RunDirectory, validate_run_id
from holdfast.training.tiers.keeping import kept_up, opened_replica

HELP = """Begin a new run, NEW_ID, with the full state of a checkpoint of RUN.

Weights, optimizer, scheduler, averages, generators and history are the checkpoint's, and run.json
of the new run says where it comes from. Without --set it goes on as RUN did, to the same bytes:
holdfast resume NEW_ID. With --set it is another training from there on: arguments of the optimizer
take effect at once, and with another learning rate, scheduler or warm-up the schedule begins anew.
optimizer.name, ema.decays and ema.posthoc_gammas cannot change. Every checkpoint that is kept in
full can be forked: the last ones, and those of checkpoint.keep_every_steps.

\b
Examples:
  holdfast fork first longer --at latest --set train.num_epochs=40
  holdfast fork first annealed --at 4200 --set optimizer.args.lr=0.0001
  holdfast fork turbofan/fd001 other-order --at 4200 --set seed=7 --store s3://my-bucket/runs
  holdfast resume longer
"""


@click.command(
    "fork",
    help=HELP,
    epilog=FORK_EXIT_CODES,
    short_help="Begin a new run with a checkpoint of another.",
)
@click.argument("run")
@click.argument("new_id")
@click.option("--at", required=True, metavar="STEP|best|latest", help=AT_HELP)
@SET_OPTION
@CONFIG_OPTION
@STORE_OPTION
@JSON_OPTION
def command(
    run: str,
    new_id: str,
    at: str,
    overrides: tuple[str, ...],
    config_file: Path | None,
    store: str,
    is_json: bool,
) -> int:
    """Fork."""
    found = find_run(reading_store(store, run), run)
    work = written_store(found)
    arguments = run_arguments(found, overrides, is_json=is_json)
    if config_file is not None:
        arguments += ["--config", str(config_file)]
    child = RunDirectory(work / found.path.parent.name / validate_run_id(new_id))
    with opened_replica(child) as replica, kept_up(replica):
        return call_training(
            ["fork", *arguments, "--at", at, "--new-run-id", new_id, "--into", str(work)]
        )
