"""``holdfast checkpoints``."""

from __future__ import annotations

from pathlib import Path

import click

from holdfast.flows.command_line.options import JSON_OPTION, STORE_OPTION
from holdfast.flows.command_line.stores import find_run
from holdfast.flows.command_line.training_commands import call_training
from holdfast.tasks.preflight import store_path
from holdfast.training.checkpointing.commands import (
    DIFF_EXIT_CODES,
    LIST_EXIT_CODES,
    VERIFY_EXIT_CODES,
)
from holdfast.training.errors import InputError

HELP = """List, verify or compare the checkpoints of a run.

\b
A run is named by its id, as EXPERIMENT/ID or by its directory; its checkpoints folder or one
checkpoint do as well.
\b
Examples:
  holdfast checkpoints list digits-20260131-030000
  holdfast checkpoints verify turbofan/fd001 --store /mnt/runs
  holdfast checkpoints diff calm killed && echo exact
  holdfast checkpoints diff runs/digits/a/checkpoints/step-00000420 \\
                            runs/digits/b/checkpoints/step-00000420
"""


@click.group(
    "checkpoints", help=HELP, short_help="List, verify or compare the checkpoints of a run."
)
def command() -> None:
    """What the manifests say, and whether the bytes are what they say."""


@command.command("list", epilog=LIST_EXIT_CODES, short_help="Steps, kinds, metrics and sizes.")
@click.argument("run")
@STORE_OPTION
@JSON_OPTION
def list_checkpoints(run: str, store: str, is_json: bool) -> int:
    """Show step, epoch, kind, metrics, size and time of each checkpoint of RUN, which is the
    latest, and what was set aside.
    """
    return _call("list", [run], store, is_json)


@command.command("verify", epilog=VERIFY_EXIT_CODES, short_help="Read every byte again.")
@click.argument("run")
@STORE_OPTION
@JSON_OPTION
def verify(run: str, store: str, is_json: bool) -> int:
    """Compare each file of each checkpoint of RUN with its manifest."""
    return _call("verify", [run], store, is_json)


@command.command("diff", epilog=DIFF_EXIT_CODES, short_help="What differs between two checkpoints.")
@click.argument("a")
@click.argument("b")
@STORE_OPTION
@JSON_OPTION
def diff(a: str, b: str, store: str, is_json: bool) -> int:
    """Name the tensors, counters and versions that differ between the checkpoints A and B, and by
    how much. Of a run, the latest one is taken.
    """
    return _call("diff", [a, b], store, is_json)


def _call(name: str, references: list[str], store: str, is_json: bool) -> int:
    places = [str(_place(store_path(store), reference)) for reference in references]
    return call_training(["checkpoints", name, *(["--json"] if is_json else []), "--", *places])


def _place(store: Path, reference: str) -> Path:
    """The directory of the run of that name, or else the path itself."""
    try:
        return find_run(store, reference).path
    except InputError:
        path = Path(reference).expanduser()
        if path.exists():
            return path
        raise
