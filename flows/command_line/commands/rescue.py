"""``holdfast rescue``."""

from __future__ import annotations

import os

import click

from holdfast.training.configuration.option import A_YEAR_S, NumberRange

HELP = """Notice runs that lost their machine, and have them started again elsewhere.

Watches the flow runs of a Prefect server that carry the tag. A run whose engine vanished is marked
Crashed, and crashed runs are started again after a pause, as long as they make progress. May run
several times side by side, and may be restarted at any time: it remembers nothing that matters.
While the server does not answer, and for a while after, it marks nothing. Needs PREFECT_API_URL,
and should see the store: it then notices a loss within about 10 s, not 80.

\b
Examples:
  holdfast rescue
  holdfast rescue --tag holdfast --every-s 5
  holdfast rescue --once                             look for a while, act, leave
"""


@click.command(
    "rescue",
    help=HELP,
    epilog="Exit codes: 0 left in order, 1 failed, 2 wrong input.",
    short_help="Notice runs that lost their machine.",
)
@click.option(
    "--tag", default="holdfast", show_default=True, help="Looks after runs with this tag."
)
@click.option(
    "--every-s",
    type=NumberRange(min=0.5, max=A_YEAR_S),
    default=1.0,
    show_default=True,
    help="Seconds.",
)
@click.option(
    "--max-rescues",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="How often a run is started again without a new checkpoint in between.",
)
@click.option(
    "--retry-delay-s",
    type=NumberRange(min=0, max=A_YEAR_S),
    default=5.0,
    show_default=True,
    help="Pause before a run is started again that crashed without a new checkpoint; then doubled.",
)
@click.option(
    "--pending-s",
    type=NumberRange(min=10, max=A_YEAR_S),
    default=120.0,
    show_default=True,
    help="A run that a worker took up is running within this time; more where nodes are ordered "
    "and images pulled first.",
)
@click.option("--once", "is_once", is_flag=True, help="Watch for one window, act, and leave.")
def command(
    tag: str,
    every_s: float,
    max_rescues: int,
    retry_delay_s: float,
    pending_s: float,
    *,
    is_once: bool,
) -> int:
    """Rescue."""
    # One answer too late is known soon, so that the gap is known soon, too.
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "1")
    os.environ.setdefault("PREFECT_API_REQUEST_TIMEOUT", "10")
    from holdfast.flows.fleet.rescue import rescue
    from holdfast.flows.fleet.rescue_policy import RescueSettings
    from holdfast.flows.fleet.server import configured_api_url, require_server

    if is_once or configured_api_url() is None:
        require_server()
    settings = RescueSettings(
        tag=tag,
        every_s=every_s,
        max_rescues=max_rescues,
        retry_delay_s=retry_delay_s,
        pending_s=pending_s,
    )
    return rescue(settings, is_once=is_once)
