"""``holdfast alias``."""

from __future__ import annotations

import click

from holdfast.flows.command_line.options import EXIT_CODES, STORE_OPTION
from holdfast.tasks.preflight import store_path
from holdfast.training.bundles.bucket_registry import open_registry
from holdfast.training.bundles.registry import BundleReference, checked_alias

HELP = """Let an alias of a bundle stand for one of its versions, whatever it stood for.

BUNDLE is NAME@VERSION or NAME@OTHER_ALIAS. Where an alias was, and why it moved, is kept: see
holdfast bundles NAME. Whether a version is good enough is asked by holdfast promote, not here.

\b
Examples:
  holdfast alias digits@3 staging
  holdfast alias digits@2 champion --reason "version 3 is slow on ARM"     back to version 2
"""


@click.command(
    "alias",
    help=HELP,
    epilog=EXIT_CODES,
    short_help="Let an alias stand for a version of a bundle.",
)
@click.argument("bundle")
@click.argument("alias")
@click.option("--reason", default="by hand", show_default=True, help="Kept in its history.")
@STORE_OPTION
def command(bundle: str, alias: str, reason: str, store: str) -> None:
    """Move it."""
    registry = open_registry(store_path(store))
    wanted = BundleReference.parse(bundle)
    version = registry.resolve(wanted)
    registry.point_alias(wanted.name, checked_alias(alias), version, reason)
    click.echo(f"{wanted.name}@{alias} is version {version}")
