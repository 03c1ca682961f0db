"""``holdfast verify``."""

from __future__ import annotations

from argparse import Namespace

import click

from holdfast.flows.command_line.options import BUNDLE_STORE_OPTION, TIME_LIMIT_OPTION
from holdfast.training.bundles import console

HELP = """Prove a bundle on this machine.

All files must be what the manifest says, none may be added, and the golden samples must give the
champion's numbers in the ONNX Runtime that is installed here. No code of the bundle runs.

\b
Examples:
  holdfast verify digits-model
  holdfast verify runs/digits/first/bundle
  holdfast verify digits@3 --store s3://my-bucket/runs
  holdfast verify s3://my-bucket/runs/digits/first/bundle
"""


@click.command(
    "verify",
    help=HELP,
    epilog="Exit codes: 0 proved, 1 refused: altered, or other numbers, 2 wrong input.",
    short_help="Prove a bundle on this machine.",
)
@click.argument("bundle")
@BUNDLE_STORE_OPTION
@TIME_LIMIT_OPTION
def command(bundle: str, store: str | None, time_limit_s: float) -> None:
    """Verify it."""
    console.run(Namespace(command="verify", bundle=bundle, store=store, time_limit_s=time_limit_s))
