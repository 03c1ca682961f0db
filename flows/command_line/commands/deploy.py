"""``holdfast deploy``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import click

import holdfast
from holdfast.flows.command_line.options import EXIT_CODES, POOL_OPTION
from holdfast.flows.fleet.notification import notify
from holdfast.flows.fleet.server import ServerUnreachableError, require_server
from holdfast.flows.fleet.work_pools import ensure_pool
from holdfast.tasks.preflight import store_path
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.tiers.scratch import parsed_store, told_store

KINDS = ("process", "docker", "kubernetes")
# A server that was started a moment ago migrates its database first.
SERVER_START_S = 60.0
DEFINITIONS = Path(holdfast.__file__).with_name("deployments")

HELP = """Put the deployments on a Prefect server: on-demand, and nightly with its schedule.

Makes the work pool unless it is there, then runs `prefect deploy` on deployments/prefect.yaml.
Needs PREFECT_API_URL, and waits a minute for a server that has only just been started. May be
repeated; an existing work pool is left as it is.

\b
Examples:
  export PREFECT_API_URL=http://127.0.0.1:4200/api
  holdfast deploy --store /mnt/runs
  holdfast deploy --store /mnt/runs --notify-url https://hooks.slack.com/services/...
  holdfast deploy --pool spot --type kubernetes --store /store
  holdfast deploy --pool spot --type kubernetes --store s3://my-bucket/runs
  holdfast worker                                    # on each machine that trains
  prefect deployment run training-pipeline/on-demand --param experiment=digits
"""


@click.command(
    "deploy", help=HELP, epilog=EXIT_CODES, short_help="Put the deployments on a Prefect server."
)
@POOL_OPTION
@click.option(
    "--type",
    "kind",
    type=click.Choice(KINDS),
    default="process",
    show_default=True,
    help="Where its runs live: processes of a worker's machine, or containers.",
)
@click.option(
    "--store",
    default="./runs",
    envvar="HOLDFAST_STORE",
    show_default=True,
    help="The folder of all runs, as the workers see it, or a bucket's address.",
)
@click.option(
    "--definitions",
    type=click.Path(path_type=Path),
    default=DEFINITIONS,
    help="Folder with prefect.yaml and pools/; the project's own unless named.",
)
@click.option(
    "--notify-url",
    envvar="HOLDFAST_NOTIFY_URL",
    help='Webhook that the server calls with {"text": ...} when a run failed for good, is stuck, '
    "was promoted or kept out.",
)
def command(pool: str, kind: str, store: str, definitions: Path, notify_url: str | None) -> int:
    """Deploy."""
    deployments = definitions / "prefect.yaml"
    if not deployments.is_file():
        raise InputError(f"there is no {deployments}; name its folder with --definitions")
    try:
        require_server()
    except ServerUnreachableError as error:
        click.echo(f"{error}; waiting a minute for it", err=True)
        require_server(SERVER_START_S)
    is_in_bucket = parsed_store(store) is not None and kind != "process"
    definition = f"{kind}_bucket.json" if is_in_bucket else f"{kind}.json"
    is_new = ensure_pool(pool, kind, definitions / "pools" / definition)
    click.echo(f"work pool {pool} ({kind}): {'made' if is_new else 'is there'}")
    _prefect_deploy(deployments, pool, told_store(store_path(store)))
    click.echo("deployed: training-pipeline/on-demand, training-pipeline/nightly")
    if notify_url is not None:
        for name in notify(notify_url):
            click.echo(f"automation {name}: calls the webhook")
    click.echo(f"start a worker on each machine: holdfast worker --pool {pool}")
    return 0


def _prefect_deploy(deployments: Path, pool: str, store: str) -> None:
    argv = python_command("prefect", "--no-prompt", "deploy", "--all")
    argv += ["--prefect-file", str(deployments.absolute())]
    done = subprocess.run(
        argv,
        # Prefect searches the folder that it stands in first, when it looks for the flow.
        cwd=deployments.absolute().parent,
        env={**os.environ, "HOLDFAST_POOL": pool, "HOLDFAST_STORE": store},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        tail = " ".join((done.stdout + done.stderr).split())[-400:]
        raise HoldfastError(f"prefect deploy ended with {done.returncode}: {tail}")
