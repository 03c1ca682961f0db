"""``holdfast prune``."""

from __future__ import annotations

import json
import re

import click

from holdfast.flows.command_line.options import JSON_OPTION
from holdfast.tasks.preflight import store_path
from holdfast.training.errors import InputError
from holdfast.training.runs.shown_text import shown
from holdfast.training.tiers.bandwidth import told_size
from holdfast.training.upkeep.plan import Rule
from holdfast.training.upkeep.pruning import Pruned, open_shelf, prune

DAY_S = 24 * 3600.0
UNITS_S = {"m": 60.0, "h": 3600.0, "d": DAY_S, "w": 7 * DAY_S}
AGE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([mhdw])")

HELP = """Delete old runs and bundles from STORE, a folder or s3://bucket/prefix, gs://…, az://….

A run or a version goes if it is not among the newest N of its experiment or name, and was not
changed for AGE. These stay whatever their age: what an alias stands for, with the run that it was
made of; runs that others were forked from, or begin with; runs that have not come to their end,
since they may be resumed, and those that somebody writes. What dead writers left a day ago or
longer goes, too.

\b
Examples:
  holdfast prune runs --keep-last 20 --older-than 30d --dry-run
  holdfast prune s3://my-bucket/runs --keep-last 20 --older-than 30d
"""


def age_s(text: str) -> float:
    """Seconds of ``30d``, ``12h``, ``90m`` or ``2w``. Raises InputError."""
    found = AGE.fullmatch(text.strip())
    if found is None:
        raise InputError(f"{text[:40]!r} is no age: write a number and m, h, d or w, as in 30d")
    return float(found[1]) * UNITS_S[found[2]]


@click.command(
    "prune",
    help=HELP,
    epilog="Exit codes: 0 pruned, 1 something could not be deleted, 2 wrong input.",
    short_help="Delete old runs and bundles.",
)
@click.argument("store")
@click.option(
    "--keep-last",
    type=click.IntRange(min=1),
    required=True,
    metavar="N",
    help="Newest runs of each experiment, and versions of each bundle, that stay.",
)
@click.option(
    "--older-than", "older_than", required=True, metavar="AGE", help="As in 30d, 12h, 90m or 2w."
)
@click.option(
    "--dry-run", "is_dry_run", is_flag=True, help="Say what would go, and delete nothing."
)
@JSON_OPTION
def command(store: str, keep_last: int, older_than: str, is_dry_run: bool, is_json: bool) -> int:
    """Prune."""
    rule = Rule(keep_last, age_s(older_than))
    folder = store_path(store)
    if not folder.is_dir():
        raise InputError(f"store {store} does not exist; name a folder or a bucket that does")
    done = prune(open_shelf(folder), rule, is_dry_run=is_dry_run)
    if is_json:
        click.echo(json.dumps(done.as_json(), indent=2))
    else:
        _tell(done, is_dry_run=is_dry_run)
    return 1 if done.failed else 0


def _tell(done: Pruned, *, is_dry_run: bool) -> None:
    verb = "would delete" if is_dry_run else "deleted"
    for one in done.gone:
        size = "" if one.num_bytes is None else f", {told_size(one.num_bytes)}"
        click.echo(shown(f"{verb} {one.name}, changed {one.age_s / DAY_S:.1f} days ago{size}"))
    for name, why in done.kept.items():
        click.echo(shown(f"kept {name}: {why}"))
    if done.num_leftovers:
        size = told_size(done.leftover_bytes)
        click.echo(f"{verb} {done.num_leftovers} leftovers of dead writers, {size}")
    if done.unseen:
        click.echo(shown(done.unseen))
    for name, why in done.failed.items():
        click.echo(shown(f"could not delete {name}: {why}"), err=True)
