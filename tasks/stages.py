"""The stages of a run as Prefect tasks. Each finds its own finished work in the run."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from holdfast.tasks.completion import complete_stage
from holdfast.tasks.job import Job
from holdfast.tasks.limits import Limits
from holdfast.tasks.reporter import Reporter


@task(name="train", persist_result=False, cache_policy=NO_CACHE)
def train(job: Job, limits: Limits, reporter: Reporter) -> bool:
    """Segments, one after another, until training is completed.

    Returns whether a champion is to be chosen: a script may hand nothing over for it.
    """
    return complete_stage("segment", job, limits, reporter).has_champion


@task(name="candidates", persist_result=False, cache_policy=NO_CACHE)
def make_candidates(job: Job, limits: Limits, reporter: Reporter) -> None:
    """Best, last, averages and moving averages, as weights below ``candidates/``."""
    complete_stage("candidates", job, limits, reporter)


@task(name="evaluate", persist_result=False, cache_policy=NO_CACHE)
def evaluate(job: Job, limits: Limits, reporter: Reporter) -> None:
    """Measure the candidates, choose the champion, then test it: ``evaluation.json``."""
    complete_stage("evaluate", job, limits, reporter)


@task(name="export", persist_result=False, cache_policy=NO_CACHE)
def export(job: Job, limits: Limits, reporter: Reporter) -> None:
    """Export the champion, prove each artifact equal to it, and publish ``bundle/``."""
    complete_stage("export", job, limits, reporter)


@task(name="promote", persist_result=False, cache_policy=NO_CACHE)
def promote(job: Job, limits: Limits, reporter: Reporter) -> None:
    """Publish the bundle in the store's registry; it becomes ``champion`` if it is not worse."""
    complete_stage("promote", job, limits, reporter)


@task(name="report", persist_result=False, cache_policy=NO_CACHE)
def write_report(job: Job, limits: Limits, reporter: Reporter) -> None:
    """Write ``report.html``."""
    complete_stage("report", job, limits, reporter)
