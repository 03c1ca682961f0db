"""The first task: is this a run that can be trained here?"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from holdfast.tasks.job import Job
from holdfast.tasks.preflight import check_job


@task(
    name="prepare",
    task_run_name="prepare {job.run_id}",
    persist_result=False,
    cache_policy=NO_CACHE,
)
def prepare(job: Job) -> Job:
    """Check all that can be checked before anything is begun.

    ``run.json`` (resolved configuration, seeds, data fingerprint, versions) is written by the
    first segment, once it has loaded the experiment and opened its data.

    Raises InputError or StorageError.
    """
    check_job(job)
    return job
