"""``holdfast checkpoints``."""

from __future__ import annotations

from pathlib import Path

import click

from holdfast.flows.command_line.options import JSON_OPTION, STORE_OPTION
from holdfast.flows.command_line.stores import find_run, reading_store
from holdfast.flows.command_line.training_commands import call_training
from holdfast.training.beginnings.commands import CONVERT_EXIT_CODES
from holdfast.training.checkpointing.commands import (
    DIFF_EXIT_CODES,
    LIST_EXIT_CODES,
    VERIFY_EXIT_CODES,
)
from holdfast.training.errors import InputError
from holdfast.training.tiers.viewing import CHECKPOINTS

HELP = """List, verify or compare the checkpoints of a run, or convert a file of other tools.

\b
A run is named by its id, as EXPERIMENT/ID or by its directory; its checkpoints folder or one
checkpoint do as well.
\b
Examples:
  holdfast checkpoints list digits-20260131-030000
  holdfast checkpoints verify turbofan/fd001 --store /mnt/runs
  holdfast checkpoints diff calm killed && echo exact
  holdfast checkpoints convert old.pt
  holdfast checkpoints diff runs/digits/a/checkpoints/step-00000420 \\
                            runs/digits/b/checkpoints/step-00000420
"""


@click.group("checkpoints", help=HELP, short_help="List, verify, compare or convert checkpoints.")
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


@command.command(
    "convert", epilog=CONVERT_EXIT_CODES, short_help="Weights of a torch file, as safetensors."
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Default: beside it, as .safetensors.",
)
@click.option("--entry", help="What the weights are called in it. Default: the usual names.")
@JSON_OPTION
def convert(file: Path, to: Path | None, entry: str | None, is_json: bool) -> int:
    """Write the weights of FILE, a file of torch.save, as safetensors, and say what becomes of all
    else in it. A run begins with them by --set train.initial_weights=FILE.safetensors.
    Nothing in FILE is run: one that holds more than tensors and plain values is refused.
    """
    named = {"--to": to, "--entry": entry}
    options = [word for name, value in named.items() if value for word in (name, str(value))]
    options += ["--json"] if is_json else []
    return call_training(["checkpoints", "convert", *options, "--", str(file)])


def _call(name: str, references: list[str], store: str, is_json: bool) -> int:
    also, is_fresh = (CHECKPOINTS,) if name != "list" else (), name == "verify"
    places = [
        str(_place(reading_store(store, reference, also=also, is_fresh=is_fresh), reference))
        for reference in references
    ]
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
