"""``holdfast worker``."""

from __future__ import annotations

import os

import click

from holdfast.flows.command_line.options import POOL_OPTION
from holdfast.flows.fleet.server import require_server
from holdfast.tasks.job import OWN_FILES_ONLY
from holdfast.training.configuration.option import A_YEAR_S, NumberRange
from holdfast.training.errors import InputError
from holdfast.training.exactness.reproducibility import python_command

HELP = """Take up runs from a work pool on this machine, and hand them over in time.

A Prefect process worker that drains: on SIGTERM (or Ctrl-C) it takes up nothing new, lets its runs
save, hands them over to other workers, and leaves. A stock `prefect worker start` kills its runs
at once and leaves them `Running` for ever. Needs PREFECT_API_URL.

\b
Examples:
  export PREFECT_API_URL=http://127.0.0.1:4200/api
  holdfast worker
  holdfast worker --pool spot --name node-3 --limit 1
  holdfast worker --drain-s 110                      a machine that is told two minutes ahead
  holdfast worker --allow digits --allow 'ours.*'    these experiments alone, and no other command
"""
POLL_EVERY_S = 1


@click.command(
    "worker",
    help=HELP,
    epilog="Exit codes: 0 left in order, 1 failed, 2 wrong input.",
    short_help="Take up runs here, and hand them over in time.",
)
@POOL_OPTION
@click.option("--name", default=None, help="Name in Prefect; one that is drawn unless given.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Runs at a time; any number unless given."
)
@click.option(
    "--queue", "queues", multiple=True, help="Only from this work queue; may be repeated."
)
@click.option(
    "--drain-s",
    type=NumberRange(min=1, max=A_YEAR_S),
    default=28.0,
    show_default=True,
    help="Seconds from SIGTERM until runs that have not left are killed; the machine's grace "
    "period less two.",
)
@click.option(
    "--allow",
    "allowed",
    multiple=True,
    metavar="PATTERN",
    help="Take up experiments of this name alone (* and ? match anything), and refuse commands, "
    "pull steps, working folders and variables that a flow run brings, and code that is not on "
    "this machine; may be repeated.",
)
def command(
    pool: str,
    name: str | None,
    limit: int | None,
    queues: tuple[str, ...],
    drain_s: float,
    allowed: tuple[str, ...],
) -> int:
    """Work."""
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", str(POLL_EVERY_S))
    from holdfast.flows.fleet.work_pools import require_pool

    require_server()
    kind = require_pool(pool)
    if kind != "process" and allowed:
        raise InputError(
            f"work pool {pool} is of type {kind}, whose worker is Prefect's own and knows no "
            "--allow; limit what its containers may do instead, see docs/hardening.md"
        )
    if kind != "process":
        return _start_stock_worker(pool, kind, name, limit)
    from holdfast.flows.fleet.worker import run_worker

    if allowed:
        os.environ[OWN_FILES_ONLY] = "1"  # for its engines: what may be run is what is here
    run_worker(pool, name=name, limit=limit, drain_s=drain_s, queues=queues, allowed=allowed)
    return 0


def _start_stock_worker(pool: str, kind: str, name: str | None, limit: int | None) -> int:
    """Pools of containers need no draining: the runs live in containers of their own."""
    click.echo(f"work pool {pool} is of type {kind}: starting Prefect's own worker", err=True)
    argv = python_command("prefect", "worker", "start", "--pool", pool, "--type", kind)
    argv += ["--name", name] if name else []
    argv += ["--limit", str(limit)] if limit else []
    os.execv(argv[0], argv)
