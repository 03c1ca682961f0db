"""The pipeline's training alone: the part that machines are killed in."""

from __future__ import annotations

import time
from pathlib import Path

from prefect import flow

from flows.attempt import attempt
from flows.training_pipeline import requested_job
from tasks.limits import Limits
from tasks.prepare import prepare
from tasks.reporter import Reporter
from tasks.stages import train

DEFAULT_LIMITS = Limits()


@flow(name="training-only", persist_result=False)
def training_only(
    experiment: str,
    run_id: str,
    store: str,
    overrides: tuple[str, ...] = (),
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    job = prepare(requested_job(experiment, run_id, store, None, overrides))
    with attempt(job), Reporter(job) as reporter:
        train(job, limits, reporter)


@flow(name="store-out-of-sight", persist_result=False)
def store_out_of_sight(
    experiment: str, run_id: str, store: str, overrides: tuple[str, ...] = ()
) -> str:
    """A flow whose run has no lease that a rescuer could see: only Prefect's heartbeat is left."""
    started = Path(store) / run_id
    is_first = not started.exists()
    started.mkdir(parents=True, exist_ok=True)
    if is_first:
        time.sleep(600)
    return "the second start ended"
