"""``holdfast bundles``."""

from __future__ import annotations

from argparse import Namespace

import click

from holdfast.flows.command_line.options import EXIT_CODES, JSON_OPTION, STORE_OPTION
from holdfast.tasks.preflight import store_path
from holdfast.training.bundles import console

HELP = """List the bundles of a store with versions, sizes, test metrics and aliases.

\b
Examples:
  holdfast bundles
  holdfast bundles digits --store /mnt/runs      with the history of its aliases
  holdfast bundles --json
"""


@click.command(
    "bundles", help=HELP, epilog=EXIT_CODES, short_help="List bundles, with versions and metrics."
)
@click.argument("name", required=False)
@STORE_OPTION
@JSON_OPTION
def command(name: str | None, store: str, is_json: bool) -> None:
    """List them."""
    console.run(Namespace(command="bundles", name=name, store=store_path(store), json=is_json))
