"""``holdfast verify-resume``."""

from __future__ import annotations

from typing import Any

import click

from holdfast.flows.command_line.training_commands import call_training
from holdfast.training.certificate.command import EXIT_CODES, HELP, verify_resume


class _Forwarded(click.Command):
    """Keeps what it was given, for a process of its own: this one loads no torch."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As any command's."""
        ctx.meta[__name__] = [*args]
        return super().parse_args(ctx, args)


@click.pass_context
def _forward(context: click.Context, /, **_: Any) -> int:
    return call_training(["verify-resume", *context.meta[__name__]])


command = _Forwarded(
    "verify-resume",
    params=verify_resume.params,
    callback=_forward,
    help=HELP,
    epilog=EXIT_CODES,
    short_help=verify_resume.short_help,
)
