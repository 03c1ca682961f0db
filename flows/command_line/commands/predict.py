"""``holdfast predict``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import click

from holdfast.flows.command_line.options import (
    BUNDLE_STORE_OPTION,
    EXIT_CODES,
    TIME_LIMIT_OPTION,
)
from holdfast.training.bundles import console
from holdfast.training.bundles.continuing import NUM_TOKENS

MAX_TOKENS = 1_000_000
HELP = """Predict a CSV, NPY or JSON file with a bundle's ONNX model, or continue a text.

A CSV file has a header and one sample a row, flattened, an empty cell is NaN; an NPY file is the
input array; a JSON file is a list of samples, or an object with such a list for each input. What is
printed is CSV, or JSON for a JSON file; --to takes either, or NPY with all outputs side by side.
A file that ends with .txt is a text, which the bundle of a language model goes on with.

\b
Examples:
  holdfast predict digits-model samples.csv
  holdfast predict digits-model samples.npy --to predictions.json
  holdfast predict language-model beginning.txt --tokens 300
  holdfast predict digits samples.csv --store s3://my-bucket/runs
"""


@click.command(
    "predict", help=HELP, epilog=EXIT_CODES, short_help="Predict a file, or continue a text."
)
@click.argument("bundle")
@click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Path(path_type=Path), metavar="FILE", help="Write there, not to stdout."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1, max=MAX_TOKENS),
    default=NUM_TOKENS,
    show_default=True,
    help="How many tokens a text goes on for.",
)
@BUNDLE_STORE_OPTION
@TIME_LIMIT_OPTION
def command(
    bundle: str,
    input_file: Path,
    to: Path | None,
    tokens: int,
    store: str | None,
    time_limit_s: float,
) -> None:
    """Predict it."""
    told = {"input": input_file, "to": to, "tokens": tokens, "store": store}
    options = {**told, "time_limit_s": time_limit_s}
    console.run(Namespace(command="predict", bundle=bundle, **options))
