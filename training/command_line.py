"""The command line of ``python -m holdfast.training``.

``__main__`` holds signals back before it imports this: a notice that arrives while Python starts
is kept, and answered once training can save. Torch is imported once the environment is right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.training.beginnings.commands import convert_command, fork_command, score_command
from holdfast.training.certificate.command import verify_resume
from holdfast.training.certificate.replay_command import replay_command
from holdfast.training.checkpointing.commands import checkpoints
from holdfast.training.configuration.loading import asked_num_threads
from holdfast.training.configuration.option import CONFIG_OPTION
from holdfast.training.configuration.page import configuration
from holdfast.training.distributed.seat import end_with_launcher, own_seat
from holdfast.training.errors import HoldfastError, InputError, StorageError
from holdfast.training.exactness.reproducibility import (
    child_environment,
    default_num_threads,
    is_environment_ready,
    python_command,
)
from holdfast.training.preemption.signals import (
    exec_held,
    hold_signals,
    install_signal_flag,
    release_signals,
)
from holdfast.training.ranks.join_command import join_command
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.storage.address import is_address
from holdfast.training.tiers.companion import keep_up_command
from holdfast.training.tiers.supervision import run_supervised
from holdfast.training.told_errors import error_line

if TYPE_CHECKING:
    from holdfast.training.stage import StageOutcome

STAGE_HELP = {
    "segment": "Train: restore the newest checkpoint and go on until the end or a notice.",
    "candidates": "Make the candidates: averages and moving averages of a finished training.",
    "evaluate": "Measure the candidates on validation data, choose, then test the champion.",
    "export": "Export the champion, prove the exports, and publish the bundle.",
    "promote": "Publish the bundle; it takes the alias champion if it is not worse than the holder "
    "and has the same inputs and outputs.",
    "report": "Write report.html.",
}
STAGE_EXIT_CODES = (
    "Exit codes: 0 completed, 75 preempted (saved; run the same command again), 2 bad input, "
    "1 failed, 130 stopped at once by a second Ctrl-C."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.pass_context
def main(context: click.Context) -> None:
    """Train exactly, and look into what training left.

    \b
    Train the digits example; call it again after any interruption until it exits with 0:
      python -m holdfast.training segment --experiment digits --store runs --run-id first
    Look at its checkpoints:
      python -m holdfast.training checkpoints list runs/digits/first

    Exit codes of a stage: 0 completed, 75 preempted (saved; run the same command again), 2 bad
    input, 1 failed, 130 stopped at once by a second Ctrl-C.
    """
    if context.invoked_subcommand not in STAGE_HELP:
        release_signals()


class StoreType(click.Path):
    """A path; or an address, which stays text: a path would lose one of its slashes."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click's."""
        is_text = isinstance(value, str) and is_address(value)
        return value if is_text else super().convert(value, param, ctx)


def _stage_options(command: Callable[..., None]) -> Callable[..., None]:
    path = click.Path(path_type=Path)
    options = [
        click.option(
            "--experiment",
            required=True,
            metavar="NAME",
            help="digits, turbofan, …, package.module:Class, path/to/file.py:Class, or "
            "NAME=path/to/train.py for a script with its own loop.",
        ),
        click.option(
            "--store",
            required=True,
            type=StoreType(),
            help="Folder that holds all runs, or s3://bucket/prefix, gs://…, az://….",
        ),
        click.option("--run-id", required=True, help="Name of the run; its folder in the store."),
        CONFIG_OPTION,
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Override one value of the configuration; may be repeated. All keys: "
            "docs/configuration.md.",
        ),
        click.option(
            "--resume", "is_resume", is_flag=True, help="Take the configuration from run.json."
        ),
        click.option(
            "--allow-mismatch",
            "should_allow_mismatch",
            is_flag=True,
            help="Go on from checkpoints of another configuration that were copied into this run's "
            "folder; a run that has begun keeps its own configuration.",
        ),
        click.option(
            "--strict",
            "is_strict",
            is_flag=True,
            help="Warnings about exactness are errors: exit code 2.",
        ),
        click.option(
            "--progress",
            "progress_format",
            type=click.Choice(["text", "jsonl", "none"]),
            default="text",
            show_default=True,
            help="Lines for people on stderr, or JSON lines on stdout.",
        ),
        click.option("--outcome-file", type=path, help="Write the outcome there as JSON, too."),
        click.option(
            "--argument",
            "script_arguments",
            multiple=True,
            help="Of a script with its own loop, for each of its arguments.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _add_stage(name: str, help_text: str) -> click.Command:
    @main.command(name, help=help_text, epilog=STAGE_EXIT_CODES)
    @_stage_options
    def command(outcome_file: Path | None, **options: Any) -> None:
        sys.exit(run_stage_process(name, outcome_file, options))

    return command


STAGE_COMMANDS = {name: _add_stage(name, help_text) for name, help_text in STAGE_HELP.items()}
click.option(
    "--again",
    "should_decide_again",
    is_flag=True,
    help="Decide again where this run has decided before.",
)(STAGE_COMMANDS["promote"])
checkpoints.add_command(convert_command)
main.add_command(checkpoints)
main.add_command(fork_command)
main.add_command(score_command)
main.add_command(configuration)
main.add_command(verify_resume)
main.add_command(replay_command)
main.add_command(keep_up_command)
main.add_command(join_command)


def run_stage_process(name: str, outcome_file: Path | None, options: dict[str, Any]) -> int:
    """Run a stage in this process, which is replaced once if its environment is not right.

    Returns the exit code.
    """
    hold_signals()
    if (seat := own_seat()) is not None:
        end_with_launcher(seat)
        outcome_file = seat.outcome_file
    if outcome_file is not None:
        outcome_file = outcome_file.absolute()  # the experiment may change the folder
    try:
        if not _can_be_written(outcome_file):
            path, outcome_file = outcome_file, None
            raise InputError(
                f"--outcome-file {path} cannot be written: name a file in a folder that is there"
            )
        if isinstance(options["store"], str):
            return run_supervised(sys.argv[1:], options["store"], _run_name(options))
        num_threads = _num_threads(options)
    except HoldfastError as error:
        print(error_line(error), file=sys.stderr)
        return _early_failure(error, outcome_file, options)
    command = python_command("holdfast.training", *sys.argv[1:])
    if not is_environment_ready(num_threads):
        exec_held(command, child_environment(num_threads))
    install_signal_flag()
    from holdfast.training.stages import run_stage

    outcome = run_stage(name, {**options, "num_threads": num_threads}, sys.argv[1:])
    if outcome.should_start_again:
        exec_held(command, child_environment(num_threads))
    _write_outcome(outcome_file, outcome)
    return outcome.exit_code


def _can_be_written(path: Path | None) -> bool:
    return path is None or (not path.is_dir() and path.absolute().parent.is_dir())


def _early_failure(error: HoldfastError, outcome_file: Path | None, options: dict[str, Any]) -> int:
    """Tell programs what ``run_stage`` tells them. Returns the exit code."""
    if outcome_file is not None or options["progress_format"] == "jsonl":
        from holdfast.training.stage import failed_outcome
        from holdfast.training.stages import emit_outcome

        outcome = failed_outcome(error)
        emit_outcome(outcome, options["progress_format"])
        _write_outcome(outcome_file, outcome)
    return error.exit_code


def _write_outcome(path: Path | None, outcome: StageOutcome) -> None:
    """What became of the stage stands in the exit code, too; a full disk does not change it."""
    if path is None:
        return
    try:
        write_json_durably(path, outcome.as_json())
    except StorageError as error:
        print(f"error: the outcome is lost: {error}", file=sys.stderr)


def _num_threads(options: dict[str, Any]) -> int:
    """Threads as configured; else those of the run's first segment; else the default."""
    asked = asked_num_threads(options["overrides"], options["config_file"])
    if asked is not None:
        return asked
    return _recorded_num_threads(options) or default_num_threads()


def _run_name(options: dict[str, Any]) -> str:
    from holdfast.training.experiment.loading import experiment_name
    from holdfast.training.runs.directory import validate_run_id

    return f"{experiment_name(options['experiment'])}/{validate_run_id(options['run_id'])}"


def _recorded_num_threads(options: dict[str, Any]) -> int | None:
    from holdfast.training.experiment.loading import experiment_name
    from holdfast.training.runs.directory import RunDirectory, read_run_record, validate_run_id

    folder = options["store"] / experiment_name(options["experiment"])
    try:
        return read_run_record(
            RunDirectory(folder / validate_run_id(options["run_id"]))
        ).num_threads
    except FileNotFoundError:
        return None
