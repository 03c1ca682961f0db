"""The stages of a run as Prefect tasks. Each finds its own finished work in the run.

And one that is the store's: pruning it.
"""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from holdfast.tasks.completion import complete_stage
from holdfast.tasks.job import Job
from holdfast.tasks.limits import Limits, Pruning
from holdfast.tasks.reporter import Reporter
from holdfast.training.errors import HoldfastError
from holdfast.training.upkeep.plan import Rule
from holdfast.training.upkeep.pruning import open_shelf, prune

DAY_S = 24 * 3600.0


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


@task(name="prune", persist_result=False, cache_policy=NO_CACHE)
def prune_store(store: Path, pruning: Pruning) -> None:
    """Delete old runs and bundles from the store. What cannot be deleted is told, and stays."""
    logger = get_run_logger()
    rule = Rule(pruning.keep_last, pruning.older_than_days * DAY_S)
    try:
        done = prune(open_shelf(store), rule)
    except HoldfastError as error:
        logger.warning("the store is not pruned: %s", error)
        return
    for one in done.gone:
        logger.info("pruned %s", one.name)
    for name, why in done.failed.items():
        logger.warning("could not prune %s: %s", name, why)
