"""``python -m holdfast.training``: ``fork``, ``score``, and ``checkpoints convert``.

What needs torch is imported when a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.training.configuration.option import CONFIG_OPTION, SET_OPTION
from holdfast.training.exactness.reproducibility import (
    child_environment,
    default_num_threads,
    is_environment_ready,
    python_command,
)
from holdfast.training.runs.shown_text import shown
from holdfast.training.tiers.scratch import told_path
from holdfast.training.told_errors import told_errors

if TYPE_CHECKING:
    from holdfast.training.beginnings.conversion import Conversion
    from holdfast.training.beginnings.scoring import Score
    from holdfast.training.stage import StageArguments

FORK_HELP = """Begin a new run with the full state of a checkpoint of another run.

Weights, optimizer, scheduler, averages, generators and history are the checkpoint's; run.json of
the new run says where it comes from. Without --set it goes on as the other run did, to the same
bytes. With another learning rate, scheduler or warm-up, the schedule begins anew there.
optimizer.name, ema.decays and ema.posthoc_gammas cannot change.

\b
Examples:
  python -m holdfast.training fork --experiment digits --store runs --run-id first \\
      --at 420 --new-run-id longer --set train.num_epochs=40 --set optimizer.args.lr=0.0001
  python -m holdfast.training segment --experiment digits --store runs --run-id longer --resume
"""
SCORE_HELP = """Score one checkpoint of a run on validation data. Nothing of the run is changed.

\b
Examples:
  python -m holdfast.training score --experiment digits --store runs --run-id first --step 420
  python -m holdfast.training score --experiment digits --store runs --run-id first --step best \\
      --json | jq .metrics
"""
CONVERT_HELP = """Write the weights of a file of torch.save as safetensors, for a run to begin with.

FILE is what training scripts usually leave: a state dict, or a dict with the model's, the
optimizer's, the scheduler's, and an epoch. A table says what is taken over, and why the rest is
not. Nothing in the file is run: one that holds more than tensors and plain values is refused.

\b
Examples:
  python -m holdfast.training checkpoints convert old.pt
  python -m holdfast.training checkpoints convert old.pt --entry ema --to averaged.safetensors
  python -m holdfast.training segment --experiment my_task.py:Task --store runs --run-id tuned \\
      --set train.initial_weights=old.safetensors
"""
FORK_EXIT_CODES = "Exit codes: 0 made, 1 cannot be read or written, 2 wrong input."
SCORE_EXIT_CODES = (
    "Exit codes: 0 scored, 75 stopped by a notice or Ctrl-C, 1 cannot be read, 2 wrong input."
)
CONVERT_EXIT_CODES = "Exit codes: 0 written, 1 cannot be written, 2 wrong input."
AT_HELP = "A step, best (by selection.metric) or latest."
JSON_OPTION = click.option("--json", "is_json", is_flag=True, help="Print JSON, and nothing else.")
PATH_TYPE = click.Path(path_type=Path)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option(
            "--experiment", required=True, metavar="NAME", help="As the run was begun with."
        ),
        click.option("--store", required=True, type=PATH_TYPE, help="Folder that holds all runs."),
        click.option("--run-id", required=True, help="Name of the run."),
        SET_OPTION,
        JSON_OPTION,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(
    "fork",
    help=FORK_HELP,
    epilog=FORK_EXIT_CODES,
    short_help="Begin a new run with a checkpoint of another run.",
)
@_run_options
@CONFIG_OPTION
@click.option("--at", required=True, help=AT_HELP)
@click.option("--new-run-id", required=True, help="Name of the new run.")
@click.option("--into", type=PATH_TYPE, help="Store of the new run. Default: that of the other.")
def fork_command(
    at: str, new_run_id: str, into: Path | None, is_json: bool, **options: Any
) -> None:
    """Fork."""
    with told_errors():
        arguments = _arguments(options)
        from holdfast.training.beginnings.fork import fork

        with _progress("copied", 2**20, "MiB") as on_bytes:
            made = fork(arguments, at, new_run_id, on_bytes, into)
    lineage = made.record.lineage
    assert lineage is not None
    if is_json:
        _print_json({"run": told_path(made.run.path), **lineage.model_dump(mode="json")})
        return
    click.echo(
        shown(f"{told_path(made.run.path)} begins with step {lineage.step} of {lineage.run_id}")
    )
    for key, value in lineage.changed.items():
        click.echo(shown(f"  {key} = {value!r}"))


@click.command(
    "score",
    help=SCORE_HELP,
    epilog=SCORE_EXIT_CODES,
    short_help="Score one checkpoint on validation data.",
)
@_run_options
@click.option("--step", "at", default="latest", show_default=True, help=AT_HELP)
def score_command(at: str, is_json: bool, **options: Any) -> None:
    """Score."""
    with told_errors():
        arguments = _arguments(options)
        from holdfast.training.beginnings.scoring import score

        with _progress("scored", 1, "samples") as on_samples:
            found = score(arguments, at, on_samples)
    if is_json:
        _print_json(found.as_json())
    else:
        for line in _score_lines(found):
            click.echo(shown(line))


@click.command(
    "convert",
    help=CONVERT_HELP,
    epilog=CONVERT_EXIT_CODES,
    short_help="Weights of a torch file, as safetensors.",
)
@click.argument("file", type=click.Path(path_type=Path, resolve_path=True))
@click.option("--to", type=PATH_TYPE, metavar="FILE", help="Default: beside it, as .safetensors.")
@click.option("--entry", help="What the weights are called in it. Default: the usual names.")
@JSON_OPTION
def convert_command(file: Path, to: Path | None, entry: str | None, is_json: bool) -> None:
    """Convert."""
    with told_errors():
        from holdfast.training.beginnings.conversion import convert

        done = convert(file, to, entry)
    if is_json:
        _print_json(done.as_json())
    else:
        for line in _conversion_lines(done):
            click.echo(shown(line))


def _arguments(options: dict[str, Any]) -> StageArguments:
    """What the options say; this process starts anew where the run's environment is another."""
    from holdfast.training.experiment.loading import experiment_name
    from holdfast.training.runs.directory import RunDirectory, read_run_record, validate_run_id

    folder = options["store"] / experiment_name(options["experiment"])
    try:
        record = read_run_record(RunDirectory(folder / validate_run_id(options["run_id"])))
        num_threads = record.num_threads or default_num_threads()
    except FileNotFoundError:
        num_threads = default_num_threads()  # that there is no run is told with its place
    if not is_environment_ready(num_threads):
        command = python_command("holdfast.training", *sys.argv[1:])
        os.execve(command[0], command, child_environment(num_threads))
    from holdfast.training.stage import StageArguments

    return StageArguments(num_threads=num_threads, is_resume=True, **options)


@contextmanager
def _progress(verb: str, unit: int, name: str) -> Iterator[Callable[[int, int], None]]:
    """How far it is, on a terminal."""
    is_shown = sys.stderr.isatty()

    def tell(done: int, total: int) -> None:
        if is_shown:
            click.echo(f"\r{verb} {done // unit} of {total // unit} {name}", err=True, nl=False)

    yield tell
    if is_shown:
        click.echo("\r\x1b[K", err=True, nl=False)


def _score_lines(found: Score) -> Iterator[str]:
    yield (
        f"step {found.step} of {found.run_id} (epoch {found.epoch}, {found.kind}), "
        f"{found.num_samples} validation samples"
    )
    for name, value in found.metrics.items():
        recorded = found.recorded.get(name)
        differs = recorded is not None and str(recorded) != str(value)  # of NaN, too
        yield f"  {name} {value:.6g}" + (f"  (recorded: {recorded:.6g})" if differs else "")


def _conversion_lines(done: Conversion) -> Iterator[str]:
    widths = [max(len(row.name) for row in done.entries), max(len(r.content) for r in done.entries)]
    for row in done.entries:
        yield f"{row.name.ljust(widths[0])}  {row.content.ljust(widths[1])}  {row.fate}"
    yield f"wrote {done.target}: begin with --set train.initial_weights={done.target}"


def _print_json(value: Any) -> None:
    from holdfast.training.runs.durable_json import without_nan

    click.echo(json.dumps(without_nan(value), indent=2, ensure_ascii=False))
