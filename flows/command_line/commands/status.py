"""``holdfast status``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from holdfast.flows.command_line.options import EXIT_CODES, JSON_OPTION, STORE_OPTION
from holdfast.flows.command_line.stores import (
    find_run,
    find_runs,
    first_command,
    full_name,
    reading_store,
)
from holdfast.tasks.engine_lease import engine_directory
from holdfast.tasks.preflight import store_path
from holdfast.tasks.run_summary import (
    RunSummary,
    reading_command,
    script_command_line,
    summarize,
    summarize_listed,
)
from holdfast.training.certificate.kept import KeptCertificate, read_certificate
from holdfast.training.errors import HoldfastError
from holdfast.training.runs.directory import RunDirectory, read_run_record
from holdfast.training.runs.losses import compare_losses
from holdfast.training.runs.shown_text import shown
from holdfast.training.storage.address import Address, is_address
from holdfast.training.tiers.listing import listed_runs
from holdfast.training.tiers.scratch import address_of, parsed_store, told_path, told_store

HELP = """Show the runs of a store, or one run with all that is known of it.

\b
Examples:
  holdfast status
  holdfast status turbofan/fd001 --store /mnt/runs
  holdfast status --json | jq '.[] | select(.state != "completed") | .name'
"""


@click.command(
    "status", help=HELP, epilog=EXIT_CODES, short_help="Show the runs of a store, or one run."
)
@click.argument("run", required=False)
@STORE_OPTION
@JSON_OPTION
def command(run: str | None, store: str, is_json: bool) -> None:
    """Show."""
    if run is not None:
        found = find_run(reading_store(store, run), run)
        summary, losses, certificate = summarize(found), compare_losses(found), _certificate(found)
        whole = {**summary.as_json(), "losses": losses.as_json(), "certificate": None}
        if certificate is not None:
            whole["certificate"] = certificate.as_json()
        told = [
            losses.told(summary.num_repeated_steps),
            None if certificate is None else certificate.told(),
        ]
        page = (
            json.dumps(whole, indent=2)
            if is_json
            else _page(summary, told, _next_steps(found, summary))
        )
        click.echo(page)
        return
    address = parsed_store(store)
    rows = _rows(store_path(store)) if address is None else _listed_rows(address)
    if is_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        _print_table(rows)
    else:
        folder = store_path(store)
        state = "has no runs" if folder.is_dir() else "does not exist"
        click.echo(
            f"store {told_store(folder)} {state} yet; start one with: {first_command(folder)}"
        )


def _rows(store: Path) -> list[dict[str, Any]]:
    """One for each run of a folder."""
    return [
        _row(full_name(run), told_path(run.path), partial(summarize, run))
        for run in find_runs(store)
    ]


def _listed_rows(address: Address) -> list[dict[str, Any]]:
    """The same of a bucket."""
    return [
        _row(run.name, f"{address}/{run.name}", partial(summarize_listed, run, address))
        for run in listed_runs(address)
    ]


def _row(name: str, path: str, summarized: Callable[[], RunSummary]) -> dict[str, Any]:
    """A run's summary; a run whose files cannot be read does not hide the others."""
    try:
        return summarized().as_json()
    except HoldfastError as error:
        return {"name": name, "path": path, "state": "unreadable", "error": str(error)}


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = {
        "run": [shown(row["name"]) for row in rows],
        "state": [row["state"] for row in rows],
        "step": [str(row.get("step", "")) for row in rows],
        "segments": [str(row.get("num_segments", "")) for row in rows],
        "champion": [shown(row.get("champion") or "") for row in rows],
        "on test data": [_scores(row.get("test_metrics") or {}) for row in rows],
    }
    widths = {name: max(map(len, [name, *values])) for name, values in columns.items()}
    lines = [{name: name for name in columns}]
    lines += [
        {name: values[number] for name, values in columns.items()} for number in range(len(rows))
    ]
    for line in lines:
        click.echo("  ".join(line[name].ljust(widths[name]) for name in columns).rstrip())
    for row in rows:
        if row["state"] == "unreadable":
            click.echo(shown(f"{row['name']}: {row['error']}"), err=True)


def _next_steps(run: RunDirectory, summary: RunSummary) -> list[str]:
    """The command that goes on with a run, or shows its report where no browser finds it."""
    try:
        script = read_run_record(run).script
    except FileNotFoundError:
        script = None
    if summary.state == "trained" and script is not None:
        return [f"for a bundle: {_resume(run)} (where the script calls run.champion)"]
    if summary.state not in ("preempted", "failed", "killed", "trained"):
        is_afar = summary.report is not None and is_address(summary.report)
        return [f"to read the report: {reading_command(run)}"] if is_afar else []
    was_in_flow = engine_directory(run).path.is_dir()
    if script is None or was_in_flow:
        return [f"to go on: {_resume(run)}"]
    return [f"to go on: {script_command_line(script)}"]


def _resume(run: RunDirectory) -> str:
    store = run.path.parent.parent
    if address_of(store) is None:
        return f"holdfast resume {run.path}"
    return f"holdfast resume {full_name(run)} --store {told_store(store)}"


def _certificate(run: RunDirectory) -> KeptCertificate | None:
    """What ``verify-resume`` has found of this run."""
    try:
        return read_certificate(run, read_run_record(run))
    except FileNotFoundError:
        return None


def told_widths(widths: Sequence[int]) -> str:
    """How many processes, or machines, each segment had, e.g. ``4 (2 segments), then 1``."""
    told = []
    for width, group in groupby(widths):
        num = len([*group])
        told.append(f"{width}" if num == 1 or num == len(widths) else f"{width} ({num} segments)")
    return ", then ".join(told)


def _page(summary: RunSummary, proofs: Sequence[str | None], next_steps: Sequence[str]) -> str:
    losses, certificate = proofs
    told: dict[str, Any] = {
        "run": summary.name,
        "state": summary.state,
        "directory": summary.path,
        "step": summary.step,
        "segments": summary.num_segments,
        "processes": told_widths(summary.widths),
        "machines": told_widths(summary.machines),
        "preemptions": summary.num_preemptions,
        "crashes": summary.num_crashes,
        "written by": summary.holder,
        "champion": summary.champion,
        "on test data": _scores(summary.test_metrics),
        "published": summary.published,
        "promotion": summary.promotion,
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in summary.ledger_s.items()),
        "goodput": f"{summary.goodput:.0%}" if summary.goodput is not None else None,
        "losses": losses,
        "certificate": certificate,
        "bundle": summary.bundle,
        "report": summary.report,
        "last error": summary.error,
    }
    lines = [f"{name:<14}{shown(value)}" for name, value in told.items() if value not in (None, "")]
    lines += [shown(line) for line in next_steps]
    return "\n".join(lines)


def _scores(metrics: dict[str, float]) -> str:
    return ", ".join(f"{shown(name)} {value:.4g}" for name, value in metrics.items())
