"""Options that several commands have."""

from __future__ import annotations

import click

from holdfast.flows.command_line.stores import DEFAULT_STORE

STORE_OPTION = click.option(
    "--store",
    default=DEFAULT_STORE,
    envvar="HOLDFAST_STORE",
    show_default=True,
    show_envvar=True,
    help="Folder that holds all runs, as a path or file:///path.",
)
JSON_OPTION = click.option("--json", "is_json", is_flag=True, help="Print JSON, and nothing else.")
