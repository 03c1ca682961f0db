"""The options ``--config`` and ``--set``, the same for every command line."""

from __future__ import annotations

from pathlib import Path

import click


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
