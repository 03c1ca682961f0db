"""A flow whose run has no lease that a rescuer could see: only Prefect's heartbeat is left."""

from __future__ import annotations

import time
from pathlib import Path

from prefect import flow


@flow(name="store-out-of-sight", persist_result=False)
def store_out_of_sight(
    experiment: str, run_id: str, store: str, overrides: tuple[str, ...] = ()
) -> str:
    """Hangs at its first start, and ends at its second."""
    started = Path(store) / run_id
    is_first = not started.exists()
    started.mkdir(parents=True, exist_ok=True)
    if is_first:
        time.sleep(600)
    return "the second start ended"
