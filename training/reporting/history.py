"""The metrics history of a run as files for other programs: ``history.json``, ``history.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from holdfast.training.checkpointing.json_state import decode
from holdfast.training.reporting.facts import newest_state
from holdfast.training.runs.durable_json import json_bytes, without_nan
from holdfast.training.runs.paths import RunDirectory

COLUMNS = ("epoch", "step", "train_loss", "learning_rate")


def history_files(run: RunDirectory) -> dict[str, bytes]:
    """Both files by name, from the newest checkpoint that can be resumed from.

    One row for each epoch that has ended; ``nan`` and ``inf`` are written as text. Empty where no
    epoch has ended yet.
    """
    rows = [_row(decode(entry, {})) for entry in newest_state(run).get("history", ())]
    if not rows:
        return {}
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return {"history.json": json_bytes(without_nan(rows)), "history.csv": text.getvalue().encode()}


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: entry.get(name) for name in COLUMNS}, **entry["metrics"]}
