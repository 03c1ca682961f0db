"""Run ids from templates, so that every night has its own and every retry of a night the same."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from holdfast.training.errors import InputError
from holdfast.training.runs.directory import validate_run_id

DEFAULT_TEMPLATE = "{experiment}-{time}"
PLACEHOLDERS = ("experiment", "date", "time", "flow_run")


def fill_run_id(template: str, *, experiment: str, start: datetime, flow_run: str = "") -> str:
    """The run id that a template names.

    Args:
        template: text with ``{experiment}``, ``{date}`` (2026-01-31), ``{time}``
            (20260131-030000) or ``{flow_run}``; all times are UTC.
        experiment: the experiment's folder in the store.
        start: when the flow run was to start first; it doesn't change when the run is taken up
            again on another machine.
        flow_run: id of the flow run; its first eight characters are used.

    Raises:
        InputError: an unknown placeholder, or a name that cannot be a folder's.
    """
    start = start.astimezone(UTC)
    values = {
        "experiment": experiment,
        "date": f"{start:%Y-%m-%d}",
        "time": f"{start:%Y%m%d-%H%M%S}",
        "flow_run": flow_run[:8],
    }
    unknown = [name for name in re.findall(r"\{(\w*)\}", template) if name not in values]
    if unknown:
        raise InputError(
            f"run id {template!r} has the unknown placeholder {{{unknown[0]}}}; "
            f"allowed: {', '.join('{' + name + '}' for name in PLACEHOLDERS)}"
        )
    return validate_run_id(re.sub(r"\{(\w+)\}", lambda found: values[found[1]], template))
