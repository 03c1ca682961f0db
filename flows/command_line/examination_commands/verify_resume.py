"""``holdfast verify-resume``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from holdfast.flows.command_line.stores import DEFAULT_STORE, find_run
from holdfast.flows.command_line.training_commands import call_training
from holdfast.tasks.preflight import store_path
from holdfast.training.certificate.command import EXIT_CODES, HELP, verify_resume


class _Forwarded(click.Command):
    """Keeps what it was given, for a process of its own: this one loads no torch."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As any command's."""
        ctx.meta[__name__] = [*args]
        return super().parse_args(ctx, args)


@click.pass_context
def _forward(context: click.Context, /, run_folder: Path | None, **_: Any) -> int:
    arguments = context.meta[__name__]
    if run_folder is not None:  # the last one counts
        store = store_path(os.environ.get("HOLDFAST_STORE") or DEFAULT_STORE)
        run = find_run(store, str(run_folder))
        arguments = [*arguments, "--run", str(run.path)]
    return call_training(["verify-resume", *arguments])


command = _Forwarded(
    "verify-resume",
    params=verify_resume.params,
    callback=_forward,
    help=HELP,
    epilog=EXIT_CODES,
    short_help=verify_resume.short_help,
)
