"""``verify-resume``, on both command lines."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from holdfast.training.certificate.lives import Target
    from holdfast.training.runs.paths import RunDirectory

from holdfast.training.configuration.option import (
    A_YEAR_S,
    CONFIG_OPTION,
    SET_OPTION,
    NumberRange,
)
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.exactness.reproducibility import default_num_threads
from holdfast.training.told_errors import EXIT_INTERRUPTED, error_line

EXIT_NO_VERDICT = 3
EXIT_PREEMPTED = 75
HELP = """Try whether a training that is stopped ends with the bytes of a calm one.

TARGET is an experiment, named as in `holdfast run`; or, after `--`, a script of your own that
calls `holdfast.run`, with its arguments. It is trained for some steps in a store that is thrown
away: once calm, and once stopped by SIGKILL and SIGTERM at places that --seed draws, with another
number of loader processes by turns. All tensors, values and losses are compared.

With --run it is the experiment or script of that run, with its configuration and its seed, and the
certificate is kept in the run: status, report, and the bundle that is exported after that show it.

Where they differ it says at which step and in which tensor first, and why: what the script does not
keep, or which operator gives two results.

\b
Examples:
  holdfast verify-resume my_task.py:Task --stops 5
  holdfast verify-resume my_task.py:Task --set data.num_workers=2 --to certificate.json
  holdfast verify-resume -- train.py --lr 0.1
  holdfast verify-resume --run runs/gpt/first
"""
EXIT_CODES = (
    "Exit codes: 0 certified, 1 it differs, 2 wrong input, 3 the budget ended without a verdict, "
    "75 stopped by SIGTERM: begin it again, 130 stopped by Ctrl-C."
)


@click.command(
    "verify-resume",
    help=HELP,
    epilog=EXIT_CODES,
    short_help="Try whether a resume is exact.",
)
@click.argument("target", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--run",
    "run_folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="RUN",
    help="A run, in the place of TARGET; the certificate is kept in it.",
)
@CONFIG_OPTION
@SET_OPTION
@click.option(
    "--stops",
    "num_stops",
    type=click.IntRange(1, 50),
    default=3,
    show_default=True,
    help="How often it is stopped.",
)
@click.option(
    "--steps",
    "num_steps",
    type=click.IntRange(min=2),
    default=40,
    show_default=True,
    help="Steps that are tried, at most.",
)
@click.option("--seed", default=0, show_default=True, help="Of the places where it is stopped.")
@click.option(
    "--budget-s",
    type=NumberRange(min=1, max=A_YEAR_S),
    default=600.0,
    show_default=True,
    help="Seconds after which it ends without a verdict.",
)
@click.option(
    "--to",
    "certificate_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the certificate there, as JSON.",
)
@click.option("--json", "is_json", is_flag=True, help="Print the certificate as JSON.")
def verify_resume(  # noqa: PLR0913, PLR0917  # one per option
    target: tuple[str, ...],
    run_folder: Path | None,
    config_file: Path | None,
    overrides: tuple[str, ...],
    num_stops: int,
    num_steps: int,
    seed: int,
    budget_s: float,
    certificate_file: Path | None,
    is_json: bool,
) -> None:
    """Try, compare, tell."""
    from holdfast.training.certificate.certifying import certify
    from holdfast.training.certificate.kept import keep_certificate
    from holdfast.training.certificate.lives import BudgetOverError, Lives
    from holdfast.training.runs.paths import RunDirectory

    run = None if run_folder is None else RunDirectory(run_folder.absolute())
    try:
        asked = _target(target, run, config_file, overrides)
        with (
            _stopped_by_sigterm(),
            tempfile.TemporaryDirectory(prefix="holdfast-verify-") as folder,
        ):
            lives = Lives(asked, Path(folder), _num_threads(asked), budget_s)
            found = certify(
                asked,
                lives,
                num_steps=num_steps,
                num_stops=num_stops,
                seed=seed,
                tell=lambda line: click.echo(line, err=True),
            )
        if run is not None:
            keep_certificate(run, found.as_json())
    except BudgetOverError:
        click.echo(
            f"no verdict: {budget_s:g} s were over; give more with --budget-s, or fewer --steps",
            err=True,
        )
        sys.exit(EXIT_NO_VERDICT)
    except _StoppedError:
        click.echo("no verdict: stopped by SIGTERM; begin it again", err=True)
        sys.exit(EXIT_PREEMPTED)
    except KeyboardInterrupt:
        click.echo("no verdict: stopped", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except HoldfastError as error:
        click.echo(error_line(error), err=True)
        sys.exit(error.exit_code)
    text = json.dumps(found.as_json(), indent=2)
    if certificate_file is not None:
        certificate_file.write_text(f"{text}\n")
    click.echo(text if is_json else "\n".join(found.lines()))
    sys.exit(0 if found.is_exact else 1)


class _StoppedError(Exception):
    """SIGTERM came."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """The life that is being waited for ends with this process, and so does its store."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        raise _StoppedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _num_threads(target: Target) -> int:
    record = target.record
    return (None if record is None else record.num_threads) or default_num_threads()


def _target(
    target: tuple[str, ...],
    run: RunDirectory | None,
    config_file: Path | None,
    overrides: tuple[str, ...],
) -> Target:
    from holdfast.training.certificate.lives import Target

    if run is not None:
        if target or config_file is not None or overrides:
            raise InputError(
                "--run is a run as it is: leave TARGET, --config and --set out, or leave --run out"
            )
        return Target.of_run(run)
    if not target:
        raise InputError("expected an experiment, -- and a script, or --run and a run")
    words = target[1:] if target[0].startswith("python") and len(target) > 1 else target
    if words[0].endswith(".py"):
        if config_file is not None or overrides:
            raise InputError("--config and --set are of experiments; a script has arguments")
        if not Path(words[0]).is_file():
            raise InputError(f"there is no script {words[0]}; expected the path of a Python file")
        return Target(script=(str(Path(words[0]).absolute()), *words[1:]))
    if len(words) > 1:
        raise InputError(
            f"expected one experiment, found {' '.join(words)}; a script comes after --"
        )
    config_file = config_file.absolute() if config_file else None
    return Target(experiment=words[0], config_file=config_file, overrides=overrides)
