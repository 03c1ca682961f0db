"""``holdfast checkpoints``."""

from __future__ import annotations

import click

from flows.options import STORE_OPTION
from flows.stores import find_run
from flows.training_commands import call_training
from tasks.preflight import store_path

HELP = """List, verify or compare the checkpoints of a run.

\b
Examples:
  holdfast checkpoints list digits-20260131-030000
  holdfast checkpoints verify turbofan/fd001 --store /mnt/runs
  holdfast checkpoints diff runs/digits/a/checkpoints/step-00000420 \\
                            runs/digits/b/checkpoints/step-00000420
"""


@click.group(
    "checkpoints", help=HELP, short_help="List, verify or compare the checkpoints of a run."
)
def command() -> None:
    """What the manifests say, and whether the bytes are what they say."""


@command.command("list", short_help="Steps, kinds, metrics and sizes.")
@click.argument("run")
@STORE_OPTION
def list_checkpoints(run: str, store: str) -> int:
    """Show step, kind, metrics and size of each checkpoint of RUN."""
    return call_training(["checkpoints", "list", str(find_run(store_path(store), run).path)])


@command.command("verify", short_help="Read every byte again.")
@click.argument("run")
@STORE_OPTION
def verify(run: str, store: str) -> int:
    """Compare each file of each checkpoint of RUN with its manifest; exit code 1 if one differs."""
    return call_training(["checkpoints", "verify", str(find_run(store_path(store), run).path)])


@command.command("diff", short_help="What differs between two checkpoints.")
@click.argument("a", type=click.Path(exists=True, file_okay=False))
@click.argument("b", type=click.Path(exists=True, file_okay=False))
def diff(a: str, b: str) -> int:
    """Name the tensors, counters and versions that differ between checkpoint folders A and B."""
    return call_training(["checkpoints", "diff", a, b])
