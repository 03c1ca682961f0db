"""The variables by which whoever starts a script speaks to it, and the script to them. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from holdfast.training.distributed.seat import own_seat

STORE = "HOLDFAST_STORE"
EXPERIMENT = "HOLDFAST_EXPERIMENT"
RUN_ID = "HOLDFAST_RUN_ID"
SETTINGS = "HOLDFAST_SETTINGS"
"""What ``--set`` said, as a JSON list of ``section.key=value``."""
ARGUMENTS = "HOLDFAST_SCRIPT_ARGUMENTS"
"""Those of the script, as a JSON list, for processes that a stage of it starts."""
IS_STRICT = "HOLDFAST_STRICT"
ALLOW_MISMATCH = "HOLDFAST_ALLOW_MISMATCH"
OUTCOME = "HOLDFAST_OUTCOME"
"""A file, in which the script leaves where its run lies and what came of it."""


def note_outcome(**values: str | int | bool) -> None:
    """Tell ``holdfast exec``, which started this process, what came of it so far.

    Of several processes of a script, the first one does.
    """
    seat = own_seat()
    if seat is not None and seat.rank > 0:
        return
    if path := os.environ.get(OUTCOME):
        file = Path(path)
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **values}))
