"""Options that several commands have."""

from __future__ import annotations

import click

from holdfast.flows.command_line.stores import DEFAULT_STORE
from holdfast.training.bundles.consumer import MAX_TIME_LIMIT_S, MIN_TIME_LIMIT_S, TIME_LIMIT_S
from holdfast.training.configuration.option import NumberRange

STORE_OPTION = click.option(
    "--store",
    default=DEFAULT_STORE,
    envvar="HOLDFAST_STORE",
    show_default=True,
    show_envvar=True,
    help="Folder that holds all runs, as a path or file:///path, or s3://bucket/prefix, gs://…, az://….",
)
TIME_LIMIT_OPTION = click.option(
    "--time-limit-s",
    type=NumberRange(min=MIN_TIME_LIMIT_S, max=MAX_TIME_LIMIT_S),
    default=TIME_LIMIT_S,
    show_default=True,
    help="End a model that runs longer.",
)
BUNDLE_STORE_OPTION = click.option(
    "--store",
    help="Take NAME, NAME@VERSION or NAME@ALIAS from this store: a folder or an address.",
)
STRICT_OPTION = click.option(
    "--strict",
    "is_strict",
    is_flag=True,
    help="Warnings about exactness are errors.",
)
JSON_OPTION = click.option("--json", "is_json", is_flag=True, help="Print JSON, and nothing else.")
POOL_OPTION = click.option(
    "--pool",
    default="holdfast",
    envvar="HOLDFAST_POOL",
    show_default=True,
    show_envvar=True,
    help="Name of the work pool.",
)
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C."
RUN_EXIT_CODES = (
    "Exit codes: 0 completed, 75 stopped by a notice or Ctrl-C, and saved: resume it, 2 wrong "
    "input, 1 failed, 130 stopped at once by a second Ctrl-C."
)
