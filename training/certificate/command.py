"""``verify-resume``, on both command lines."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from holdfast.training.certificate.lives import Target

from holdfast.training.configuration.option import CONFIG_OPTION, SET_OPTION
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.exactness.reproducibility import default_num_threads

EXIT_NO_VERDICT = 3
HELP = """Try whether a training that is stopped ends with the bytes of a calm one.

TARGET is an experiment, named as in `holdfast run`; or, after `--`, a script of your own that
calls `holdfast.run`, with its arguments. It is trained for some steps in a store that is thrown
away: once calm, and once stopped by SIGKILL and SIGTERM at places that --seed draws, with another
number of loader processes by turns. All tensors, values and losses are compared.

Where they differ it says at which step and in which tensor first, and why: what the script does not
keep, or which operator gives two results.

\b
Examples:
  holdfast verify-resume my_task.py:Task --stops 5
  holdfast verify-resume my_task.py:Task --set data.num_workers=2 --to certificate.json
  holdfast verify-resume -- train.py --lr 0.1
"""
EXIT_CODES = (
    "Exit codes: 0 certified, 1 it differs, 2 wrong input, 3 the budget ended without a verdict, "
    "130 stopped by Ctrl-C."
)


@click.command(
    "verify-resume",
    help=HELP,
    epilog=EXIT_CODES,
    short_help="Try whether a resume is exact.",
)
@click.argument("target", nargs=-1, required=True, type=click.UNPROCESSED)
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
    type=click.FloatRange(min=1),
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
    from holdfast.training.certificate.lives import BudgetOverError, Lives

    try:
        asked = _target(target, config_file, overrides)
        with tempfile.TemporaryDirectory(prefix="holdfast-verify-") as folder:
            lives = Lives(asked, Path(folder), default_num_threads(), budget_s)
            found = certify(
                asked,
                lives,
                num_steps=num_steps,
                num_stops=num_stops,
                seed=seed,
                tell=lambda line: click.echo(line, err=True),
            )
    except BudgetOverError:
        click.echo(
            f"no verdict: {budget_s:g} s were over; give more with --budget-s, or fewer --steps",
            err=True,
        )
        sys.exit(EXIT_NO_VERDICT)
    except HoldfastError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    text = json.dumps(found.as_json(), indent=2)
    if certificate_file is not None:
        certificate_file.write_text(f"{text}\n")
    click.echo(text if is_json else "\n".join(found.lines()))
    sys.exit(0 if found.is_exact else 1)


def _target(
    target: tuple[str, ...], config_file: Path | None, overrides: tuple[str, ...]
) -> Target:
    from holdfast.training.certificate.lives import Target

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
