"""``holdfast run``."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from holdfast.flows.command_line.local_run import (
    EXIT_INTERRUPTED,
    LocalOutcome,
    as_error,
    resume_command,
    run_locally,
)
from holdfast.flows.command_line.options import (
    JSON_OPTION,
    RUN_EXIT_CODES,
    STORE_OPTION,
    STRICT_OPTION,
)
from holdfast.flows.command_line.progress_view import open_view
from holdfast.flows.command_line.stores import DEFAULT_STORE
from holdfast.tasks.job import Job
from holdfast.tasks.preflight import check_job, store_path
from holdfast.tasks.run_summary import reading_command
from holdfast.training.code.naming import named_run
from holdfast.training.configuration.option import CONFIG_OPTION, SET_OPTION
from holdfast.training.errors import InputError
from holdfast.training.experiment.loading import experiment_name, is_script, script_path
from holdfast.training.preemption.deathwatch import EXIT_PREEMPTED
from holdfast.training.runs.run_ids import DEFAULT_TEMPLATE, fill_run_id
from holdfast.training.runs.shown_text import shown
from holdfast.training.storage.address import is_address
from holdfast.training.tiers.scratch import told_path, told_store

HELP = """Train an experiment or a script, from seed to verified bundle.

EXPERIMENT is a name in the table (digits, turbofan, ...), package.module:Class, or
path/to/file.py:Class. A training script with its own loop is named by its path; its own arguments
come after --, and its run is the one that it names itself, unless --run-id does. What is done is
found in the store and not done again: the same --run-id resumes a run.

Without a Prefect server this starts a temporary one; with PREFECT_API_URL it uses that one.
Ctrl-C saves, says how to go on, and exits with 75.

\b
Examples:
  holdfast run digits
  holdfast run digits --set train.num_epochs=5 --set optimizer.args.lr=0.002
  holdfast run turbofan --set data.folder=/data/cmapss --run-id fd001 --store /mnt/runs
  holdfast run my_task.py:Task --config my_task.toml --json
  holdfast run train.py --store /mnt/runs -- --lr 0.1
"""


@click.command(
    "run",
    help=HELP,
    epilog=RUN_EXIT_CODES,
    short_help="Train an experiment or script, from seed to verified bundle.",
)
@click.argument("experiment")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@CONFIG_OPTION
@SET_OPTION
@STORE_OPTION
@click.option(
    "--run-id",
    default=DEFAULT_TEMPLATE,
    show_default=True,
    help="Name of the run; the same name again resumes it.",
)
@STRICT_OPTION
@JSON_OPTION
def command(  # noqa: PLR0913, PLR0917  # one per option
    experiment: str,
    arguments: tuple[str, ...],
    config_file: Path | None,
    overrides: tuple[str, ...],
    store: str,
    run_id: str,
    is_strict: bool,
    is_json: bool,
) -> int:
    """Start or go on."""
    if is_script(experiment):
        experiment, run_id = _named_script(experiment, run_id)
    elif arguments:
        raise InputError(
            f"{experiment} is an experiment and takes no argument {arguments[0]!r}: say what "
            f"differs with --set section.key=value"
        )
    folder = experiment_name(experiment)
    job = Job(
        experiment=experiment,
        store=store_path(store),
        run_id=fill_run_id(run_id, experiment=folder, start=datetime.now(UTC)),
        config_file=config_file.expanduser().absolute() if config_file else None,
        overrides=overrides,
        is_strict=is_strict,
        arguments=arguments,
    )
    return run_job(job, is_json=is_json)


def _named_script(reference: str, run_id: str) -> tuple[str, str]:
    """A script with the names that it gives to its run, where they are not given here."""
    lone = Path(reference).expanduser()
    path = lone if lone.is_file() else script_path(reference).expanduser()
    name, own_run_id = named_run(path)
    given = experiment_name(reference) if path is not lone else name or path.stem
    is_unset = run_id == DEFAULT_TEMPLATE
    return f"{given}={path.absolute()}", own_run_id if is_unset and own_run_id else run_id


def run_job(job: Job, *, is_json: bool) -> int:
    """Check a job, run it here, and tell how it went; the exit code."""
    config = check_job(job)
    parameters = {
        "experiment": job.experiment,
        "run_id": job.run_id,
        "store": told_store(job.store),
        "config_file": str(job.config_file) if job.config_file else None,
        "overrides": list(job.overrides),
        "is_resume": job.is_resume,
        "is_strict": job.is_strict,
        "arguments": list(job.arguments),
        "limits": {"grace_period_s": config.preemption.grace_period_s},
    }
    view = open_view(is_json=is_json)
    outcome = run_locally(parameters, view)
    if is_json:
        click.echo(json.dumps(_as_json(job, outcome), indent=2))
        return outcome.exit_code
    if outcome.exit_code in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
        _tell_how_to_go_on(job, outcome)
    elif outcome.exit_code != 0:
        raise as_error(outcome)
    else:
        assert outcome.result is not None
        _tell_result(job, outcome.result)
    return outcome.exit_code


def _tell_how_to_go_on(job: Job, outcome: LocalOutcome) -> None:
    where = f"at step {outcome.step}" if outcome.step is not None else "before its first step"
    is_saved = outcome.exit_code == EXIT_PREEMPTED
    kept = "nothing is lost" if is_saved else "it was not saved, the last checkpoint counts"
    click.echo(f"stopped {where}; {kept}. To go on:", err=True)
    click.echo(f"  {resume_command(job.run_id, told_store(job.store), DEFAULT_STORE)}", err=True)


def _tell_result(job: Job, result: dict[str, Any]) -> None:
    test_metrics = result["test_metrics"]
    scores = ", ".join(f"{shown(name)} {value:.4g}" for name, value in test_metrics.items())
    goodput = result["goodput"]
    rows = [
        ("run", result["name"]),
        ("champion", result["champion"]),
        ("on test data", scores),
        ("bundle", result["bundle"]),
        ("published", result["published"]),
        ("promotion", result["promotion"]),
        ("report", result["report"]),
        ("segments", _lives(result)),
        ("goodput", f"{goodput:.0%}" if goodput is not None else None),
    ]
    for name, value in rows:
        if value:
            click.echo(f"{name:<14}{shown(value)}")
    if not result["bundle"]:
        click.echo("no bundle: the script hands over no champion (run.champion)")
    if result["report"] and is_address(result["report"]):
        click.echo(f"to read the report: {reading_command(job.run)}")


def _lives(result: dict[str, Any]) -> str:
    parts = [
        f"{result[key]} {word}"
        for key, word in (("num_preemptions", "preempted"), ("num_crashes", "crashed"))
        if result[key]
    ]
    return f"{result['num_segments']}" + (f" ({', '.join(parts)})" if parts else "")


def _as_json(job: Job, outcome: LocalOutcome) -> dict[str, Any]:
    return {
        "exit_code": outcome.exit_code,
        "run": told_path(job.run.path),
        "step": outcome.step,
        "message": outcome.message,
        "result": outcome.result,
    }
