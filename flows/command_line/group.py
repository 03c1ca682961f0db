"""The command line ``holdfast``.

Each command is the attribute ``command`` of a module of its name in ``commands/`` or in another of
the ``PACKAGES``, which is imported only when it is used, so that ``holdfast --help`` answers at
once. To add a command, write such a module and add a row to ``COMMANDS``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.runs.shown_text import shown_lines
from holdfast.training.told_errors import EXIT_INTERRUPTED, error_line

PACKAGES = {
    "checkpoint_commands": ("checkpoints", "evaluate", "fork"),
    "store_commands": ("copy", "prune"),
    "examination_commands": ("check", "verify-resume", "replay", "doctor", "simulate"),
}
"""Of commands that are not in ``commands/``."""
COMMANDS = {
    "run": "Train an experiment or script, from seed to verified bundle.",
    "verify-resume": "Try whether a resume is exact.",
    "replay": "Do steps again, and compare their losses.",
    "check": "Find what would go wrong, before training.",
    "exec": "Start a training script, again and again.",
    "resume": "Go on with a run that was stopped or failed.",
    "status": "Show the runs of a store, or one run.",
    "logs": "Show what a run's segments said.",
    "report": "Write a run's report again, and say where.",
    "simulate": "Reckon what preemptions would cost a run.",
    "checkpoints": "List, verify, compare or convert checkpoints.",
    "evaluate": "Score one checkpoint on validation data.",
    "fork": "Begin a new run with a checkpoint of another.",
    "bundles": "List bundles, with versions and metrics.",
    "promote": "Publish a run's bundle, and let it win or not.",
    "alias": "Let an alias stand for a version of a bundle.",
    "pull": "Copy a bundle out of a store, verified.",
    "verify": "Prove a bundle on this machine.",
    "predict": "Predict a file, or continue a text.",
    "copy": "Copy a run to another store.",
    "prune": "Delete old runs and bundles.",
    "deploy": "Put the deployments on a Prefect server.",
    "worker": "Take up runs here, and hand them over in time.",
    "join": "Let this machine take part in a run.",
    "rescue": "Notice runs that lost their machine.",
    "doctor": "Check that this machine is fit to train.",
}
"""What the overview says of each command; the command's own short help."""

EXAMPLES = """
\b
Examples:
  holdfast run digits                        train, choose, export, check; all below ./runs
  holdfast run digits --set train.num_epochs=5 --run-id short
  holdfast run my_task.py:Task --config my_task.toml --store /mnt/runs
  holdfast check my_task.py:Task             would it train, resume and export?
  holdfast resume short                      after Ctrl-C, a crash, or a lost machine
  holdfast status                            what is there, and how it did
  holdfast doctor                            is this machine fit to train?

\b
Exit codes:
  0 completed    75 preempted, saved: resume it    2 wrong input    1 failed
"""


def load_command(name: str) -> click.Command:
    """A command of the table, imported now."""
    package = next((room for room, names in PACKAGES.items() if name in names), "commands")
    module = f"holdfast.flows.command_line.{package}.{name.replace('-', '_')}"
    command: click.Command = importlib.import_module(module).command
    return command


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command itself, imported now; None where there is none of that name."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The overview, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the nearest name where there is none of that name."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from holdfast.training.configuration.loading import nearest

            ctx.fail(f"there is no command {args[0]!r}; {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="holdfast", prog_name="holdfast")
def holdfast() -> None:
    """Train PyTorch models on machines that may vanish at any second, and get the weights you
    would have got without a single interruption. Bit for bit.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 completed, 75 preempted, 2 bad input, 1 failed."""
    sys.exit(exit_code_of(arguments))


def exit_code_of(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code. Errors are told on stderr."""
    try:
        code = holdfast.main(args=arguments, prog_name="holdfast", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        return _refuse(error)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no second complaint
        return 0
    except HoldfastError as error:
        return _fail(str(error), error.exit_code)
    return code if isinstance(code, int) else 0


def _refuse(error: click.UsageError) -> int:
    """Tell how the command line is used: all of it where there was nothing on it."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return error.exit_code
    hint = f"; try {error.ctx.command_path} --help" if error.ctx else ""
    return _fail(f"{error.format_message()}{hint}", error.exit_code)


def _fail(message: str, exit_code: int) -> int:
    """Tell what is wrong: with the input, in one line; with a run, also the end of its log."""
    is_input = exit_code == InputError.exit_code
    click.echo(error_line(message) if is_input else f"error: {shown_lines(message)}", err=True)
    return exit_code
