"""The pipeline, from top to bottom.

Every step finds its own finished work in the run directory: the same flow run, started again on
any machine that sees the store, skips what is done and goes on where it stood.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from holdfast.flows.pipeline.attempt import attempt
from holdfast.tasks.artifacts import show_run
from holdfast.tasks.job import Job, code_here
from holdfast.tasks.limits import Limits, Pruning
from holdfast.tasks.preflight import store_path
from holdfast.tasks.prepare import prepare
from holdfast.tasks.reporter import Reporter
from holdfast.tasks.run_summary import summarize
from holdfast.tasks.stages import (
    evaluate,
    export,
    make_candidates,
    promote,
    prune_store,
    train,
    write_report,
)
from holdfast.training.errors import HoldfastError
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.runs.run_ids import DEFAULT_TEMPLATE, fill_run_id

DEFAULT_LIMITS = Limits()
NO_CHAMPION = (
    "the script hands over no champion: the run ends with its checkpoints; for a bundle call "
    "run.champion(model=…, evaluate=…, example_inputs=…) after its loop, and resume"
)


def name_flow_run() -> str:
    """``experiment/run_id``, as the flow run is called in Prefect.

    What is wrong with them is told by the flow itself: an error here would end the engine, which
    counts as a crash and is tried again.
    """
    parameters: dict[str, Any] = flow_run.parameters
    experiment, run_id = str(parameters["experiment"]), str(parameters["run_id"])
    try:
        job = requested_job(experiment, run_id, parameters["store"])
        return f"{experiment_name(job.experiment)}/{job.run_id}"
    except HoldfastError:
        return f"{experiment}/{run_id}"


@flow(name="training-pipeline", flow_run_name=name_flow_run, persist_result=False)
def training_pipeline(  # noqa: PLR0913, PLR0917  # one per parameter of the deployments
    experiment: str = "digits",
    run_id: str = DEFAULT_TEMPLATE,
    store: str = "./runs",
    config_file: str | None = None,
    overrides: tuple[str, ...] = (),
    is_resume: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    is_strict: bool = False,
    arguments: tuple[str, ...] = (),
    pruning: Pruning | None = None,
) -> dict[str, Any]:
    """Train an experiment, choose its champion, export it, and publish a verified bundle.

    Args:
        experiment: Name in the table (digits, turbofan, ...), package.module:Class, or
            path/to/file.py:Class. A script with its own loop: path/to/train.py, or
            NAME=path/to/train.py for runs in the folder NAME.
        run_id: Name of the run. Placeholders: {experiment}, {date}, {time}, {flow_run}; times are
            those of the scheduled start, in UTC. The same name again resumes the run.
        store: Folder that holds all runs; all workers must see it under this name.
        config_file: TOML file with the configuration; unset takes the experiment's own defaults.
        overrides: Single configuration values, each as section.key=value.
        is_resume: Take the configuration from the run's run.json.
        limits: Grace period and crash budget.
        is_strict: Warnings about exactness are errors.
        arguments: Those of a script.
        pruning: What old runs and bundles the store keeps, once this run is done; unset: all.
    """
    asked = requested_job(experiment, run_id, store, config_file, overrides, is_resume)
    asked = prepare(replace(asked, is_strict=is_strict, arguments=tuple(arguments)))
    with attempt(asked), code_here(asked) as job:
        with Reporter(job) as reporter:
            if train(job, limits, reporter):
                make_candidates(job, limits, reporter)
                evaluate(job, limits, reporter)
                export(job, limits, reporter)
                promote(job, limits, reporter)
            else:
                reporter.warn(NO_CHAMPION)
            write_report(job, limits, reporter)
        show_run(job)
    if pruning is not None:
        prune_store(job.store, pruning)
    return summarize(job.run).as_json()


def requested_job(
    experiment: str,
    run_id: str,
    store: str,
    config_file: str | None = None,
    overrides: tuple[str, ...] = (),
    is_resume: bool = False,
) -> Job:
    """The job that a flow run's parameters ask for; the same at each start of that flow run."""
    return Job(
        experiment=experiment,
        store=store_path(store),
        run_id=fill_run_id(
            run_id,
            experiment=experiment_name(experiment),
            start=flow_run.scheduled_start_time or datetime.now(UTC),
            flow_run=str(flow_run.id or ""),
        ),
        config_file=Path(config_file).expanduser().absolute() if config_file else None,
        overrides=tuple(overrides),
        is_resume=is_resume,
    )
