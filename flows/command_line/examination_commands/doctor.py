"""``holdfast doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from holdfast.flows.command_line.examinations import EXAMINATIONS, OF_BUCKETS, Finding
from holdfast.flows.command_line.options import JSON_OPTION, STORE_OPTION
from holdfast.tasks.preflight import store_path
from holdfast.training.configuration.option import A_YEAR_S, NumberRange
from holdfast.training.tiers.scratch import address_of

HELP = """Check that this machine is fit to train, and say what to do where it is not.

Looks at versions and pins, the store and its disk, the clocks, the Prefect server, the GPU, whether
two processes can train together, at which address other machines find this one and whether the
places where the store's runs meet can be reached, and the time that a save takes against the grace
period. Exit code 1 if something has to be put right.

\b
Examples:
  holdfast doctor
  holdfast doctor --store /mnt/runs --json
"""
SIGNS = {"good": "ok", "warning": "note", "bad": "BAD"}


@click.command(
    "doctor",
    help=HELP,
    epilog="Exit codes: 0 fit, 1 something has to be put right, 2 wrong input.",
    short_help="Check that this machine is fit to train.",
)
@STORE_OPTION
@click.option(
    "--grace-period-s",
    type=NumberRange(min=0, max=A_YEAR_S, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds from a notice to the machine's end.",
)
@JSON_OPTION
def command(store: str, grace_period_s: float, is_json: bool) -> int:
    """Examine."""
    folder = store_path(store)
    findings: list[Finding] = []
    is_bucket = address_of(folder) is not None
    for examine in (*EXAMINATIONS, *OF_BUCKETS) if is_bucket else EXAMINATIONS:
        found = examine(folder, grace_period_s)
        findings.append(found)
        if not is_json:
            click.echo(f"{SIGNS[found.verdict]:<5} {found.subject:<15} {found.detail}")
    if is_json:
        click.echo(json.dumps([asdict(found) for found in findings], indent=2))
    return 1 if any(found.verdict == "bad" for found in findings) else 0
