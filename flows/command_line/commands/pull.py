"""``holdfast pull``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import click

from holdfast.flows.command_line.options import STORE_OPTION
from holdfast.tasks.preflight import store_path
from holdfast.training.bundles import console

HELP = """Copy a bundle out of a store, every byte verified.

--store may also be the URL at which a static file server shows a store.

REFERENCE is NAME, NAME@VERSION or NAME@ALIAS; without @ the alias champion is meant. Interrupted,
the same command goes on where it stood. Nothing is at DIR before all of it is right.

\b
Examples:
  holdfast pull digits --to digits-model
  holdfast pull turbofan@3 --store /mnt/runs --to third --only onnx
  holdfast pull digits@nightly --store https://models.example/runs --to nightly
"""


@click.command(
    "pull",
    help=HELP,
    epilog="Exit codes: 0 pulled, 1 refused or not there, 2 wrong input, 130 stopped by Ctrl-C.",
    short_help="Copy a bundle out of a store, verified.",
)
@click.argument("reference")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where the bundle goes; missing, empty, or a pull that was interrupted.",
)
@click.option(
    "--only", multiple=True, metavar="FORMAT", help="Leave the other formats out; repeatable."
)
@STORE_OPTION
def command(reference: str, to: Path, only: tuple[str, ...], store: str) -> None:
    """Pull it."""
    place = store if console.is_url(store) else store_path(store)
    console.run(Namespace(command="pull", reference=reference, to=to, only=list(only), store=place))
