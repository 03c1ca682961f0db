"""Options ``--config`` and ``--set`` and the type of numbers, the same for every command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

A_YEAR_S = 366 * 24 * 3600.0


class NumberRange(click.FloatRange):
    """A range of numbers; "nan", which is beside each of its ends, is refused as well."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, or the error of a value that cannot be taken."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


def _one_file(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001  # click's signature
    files: tuple[Path, ...],
) -> Path | None:
    if len(files) > 1:
        context.fail(
            f"--config may be given once, found {' and '.join(map(str, files))}: "
            "write one file, and what differs with --set"
        )
    return files[0] if files else None


CONFIG_OPTION = click.option(
    "--config",
    "config_file",
    multiple=True,
    type=click.Path(path_type=Path),
    callback=_one_file,
    help="TOML file, once; `python -m holdfast.training configuration` prints all keys.",
)
SET_OPTION = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one configuration value; may be repeated.",
)
