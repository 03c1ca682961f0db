"""``holdfast check``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from holdfast.flows.command_line.options import JSON_OPTION, STORE_OPTION, STRICT_OPTION
from holdfast.flows.command_line.progress_view import ProgressView, open_view
from holdfast.tasks.preflight import store_path
from holdfast.training.configuration.loading import asked_num_threads
from holdfast.training.configuration.option import CONFIG_OPTION, SET_OPTION
from holdfast.training.errors import HoldfastError
from holdfast.training.exactness.reproducibility import default_num_threads
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.rehearsal.asking import Asked, rehearse
from holdfast.training.rehearsal.findings import Report, error_of, lines
from holdfast.training.rehearsal.request import Depth

HELP = """Rehearse an experiment: find what would go wrong later, before anything is trained.

EXPERIMENT is named as in `holdfast run`, with the same options. In a process of its own, on objects
that are thrown away, it trains two steps, saves and restores into a fresh model and compares the
bytes, trains a step twice, validates, and makes every configured export from weights that are
hardly trained. Each finding says what to do. Nothing is written.

Every run begins with the same rehearsal; `rehearsal.depth` and `rehearsal.max_s` say how much.

\b
Findings:
  error      not fit: training, a resume or an export would fail
  warning    a resumed run would not be exact; an error with --strict
  note       good to know

\b
Examples:
  holdfast check digits
  holdfast check my_task.py:Task --config my_task.toml --strict
  holdfast check my_task.py:Task --depth step        without the exports, in a third of the time
  holdfast check turbofan --set data.folder=/data/cmapss --json | jq .is_fit
"""
EXIT_CODES = (
    "Exit codes: 0 fit, 2 not fit or wrong input, 1 the rehearsal itself failed and may be tried "
    "again, 130 stopped by Ctrl-C."
)


@click.command(
    "check",
    help=HELP,
    epilog=EXIT_CODES,
    short_help="Find what would go wrong, before training.",
)
@click.argument("experiment")
@CONFIG_OPTION
@SET_OPTION
@STORE_OPTION
@STRICT_OPTION
@click.option(
    "--depth",
    type=click.Choice(["step", "export"]),
    help="How much is tried: training, saving and validation, or the exports as well. Unset: "
    "rehearsal.depth of the configuration.",
)
@JSON_OPTION
def command(  # one per option
    experiment: str,
    config_file: Path | None,
    overrides: tuple[str, ...],
    store: str,
    is_strict: bool,
    depth: Depth | None,
    is_json: bool,
) -> int:
    """Rehearse and tell."""
    experiment_name(experiment)
    config_file = config_file.expanduser().absolute() if config_file else None
    num_threads = asked_num_threads(overrides, config_file) or default_num_threads()
    asked = Asked(experiment, store_path(store), num_threads, config_file, overrides, depth)
    report = _rehearse(asked, open_view(is_json=is_json))
    error = error_of(report, is_strict=is_strict)
    if is_json:
        click.echo(json.dumps(report.as_json(is_strict=is_strict), indent=2))
    else:
        _tell(experiment, report, error)
    return 0 if error is None else error.exit_code


def _rehearse(asked: Asked, view: ProgressView) -> Report:
    def on_act(act: str, number: int, total: int) -> None:
        values = {"done": number, "total": total, "message": act}
        view.show({"event": "rehearsing", "stage": "rehearsal", **values})

    try:
        report = rehearse(asked, on_act=on_act)
    finally:
        view.close()
    assert report is not None
    return report


def _tell(experiment: str, report: Report, error: HoldfastError | None) -> None:
    for finding in report.findings:
        if finding.traceback:
            click.echo(finding.traceback, err=True, nl=False)
    sys.stderr.flush()
    for line in lines(report):
        click.echo(line)
    verdict = "fit to be trained" if error is None else "NOT fit to be trained"
    num_acts = len(report.acts)
    click.echo(f"{experiment} is {verdict}: {num_acts} acts in {report.duration_s:.1f} s")
