"""The stages of a run as Prefect tasks. Each finds its own finished work in the run."""

from __future__ import annotations

import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.child import Stage, StageCommand, run_stage
from tasks.job import Job
from tasks.limits import Limits
from tasks.reporter import Reporter
from tasks.stage_errors import stage_error


@task(name="train", persist_result=False, cache_policy=NO_CACHE)
def train(job: Job, limits: Limits, reporter: Reporter) -> None:
    """Segments, one after another, until training is completed."""
    complete_stage("segment", job, limits, reporter)


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


@task(name="report", persist_result=False, cache_policy=NO_CACHE)
def write_report(job: Job, limits: Limits, reporter: Reporter) -> None:
    """Write ``report.html``."""
    complete_stage("report", job, limits, reporter)


def complete_stage(stage: Stage, job: Job, limits: Limits, reporter: Reporter) -> None:
    """Run a stage again and again until it completes.

    A preemption of the child alone costs nothing but a new start; crashes are retried with
    growing pauses up to the limit.

    Raises:
        StageInputError: the stage refused its input.
        StageFailedError: it failed for good.
    """
    command = StageCommand(stage, job, limits.grace_period_s)
    num_crashes = num_preemptions = 0
    reporter.event({"event": "stage", "stage": stage, "state": "started"})
    while True:
        outcome = run_stage(command, reporter.event, reporter.log)
        if outcome.outcome == "completed":
            break
        if outcome.outcome == "preempted":
            num_preemptions += 1
        else:
            num_crashes += 1
        is_over = num_crashes > limits.max_crashes or num_preemptions > limits.max_idle_preemptions
        if is_over or outcome.is_final:
            raise stage_error(command, outcome)
        if outcome.outcome == "failed":
            pause_s = limits.crash_backoff_s * 2 ** (num_crashes - 1)
            reporter.warn(f"{stage} crashed ({outcome.explain()}); again in {pause_s:.0f} s")
            time.sleep(pause_s)
    reporter.event({"event": "stage", "stage": stage, "state": "finished"})
