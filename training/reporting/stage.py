"""The stage ``report``: ``report.html``, from what the run's directory holds at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.training.averages.ensemble import experiment_of
from holdfast.training.champion.candidates import preempted
from holdfast.training.exactness.seeding import seed_generators
from holdfast.training.experiment.protocol import Dataset, Records
from holdfast.training.export.weights import read_tensors
from holdfast.training.loop.evaluation import evaluate
from holdfast.training.loop.experiment_state import experiment_checkpoint, restore_experiment
from holdfast.training.loop.train_step import resolve_device
from holdfast.training.reporting.facts import RunFacts, history_files, read_facts
from holdfast.training.reporting.figures import Figure, experiment_figures
from holdfast.training.reporting.page import page
from holdfast.training.runs.fenced import publish_bytes
from holdfast.training.runs.stored_json import read_json
from holdfast.training.stage import Stage, StageOutcome
from holdfast.training.weights.frozen import load_saved


class _NoticeCameError(Exception):
    """A notice came while the champion was predicting."""


def run_report(stage: Stage) -> StageOutcome:
    """Write ``report.html`` and the history beside it; what is there already is left alone.

    Of a run that has not come to its end the page tells what there is, and what is missing.

    Raises:
        DataFormatError: a file of the run is not what Holdfast wrote.
        ExportError: the champion's weights do not fit the experiment's model.
    """
    try:
        facts = report_facts(stage)
    except _NoticeCameError:
        return preempted(stage)
    path, is_script = stage.run.report_html, stage.record.script is not None
    files = {path.name: page(facts).encode(), **history_files(stage.run, is_script=is_script)}
    changed = {name: content for name, content in files.items() if _is_other(path, name, content)}
    if changed:
        with stage.writing() as lease:
            for name, content in changed.items():
                publish_bytes(lease, path.with_name(name), content)
    stage.progress.emit("report", path=str(path))
    return StageOutcome("completed", 0)


def report_facts(stage: Stage) -> RunFacts:
    """Everything that the page tells, the champion's predictions included."""
    facts = read_facts(stage.run, stage.record, stage.config)
    has_figures = facts.champion is not None and stage.record.script is None
    return replace(facts, figures=_figures(stage)) if has_figures else facts


def _figures(stage: Stage) -> Sequence[Figure]:
    evaluation: Any = read_json(stage.run.evaluation_json)
    path = stage.run.path / evaluation["champion"]["path"]
    seed_generators(stage.seed("model"))
    restore_experiment(stage.experiment, experiment_checkpoint(stage.run))
    champion = experiment_of(stage.experiment, evaluation["champion"]["name"])
    model = champion.model()
    weights, config = read_tensors(path), stage.config.checkpoint
    load_saved(model, weights, config, experiment_checkpoint(stage.run))
    model.to(resolve_device(stage.config.train.device))

    def measure(dataset: Dataset) -> Records:
        records = evaluate(
            stage.experiment,
            model,
            dataset,
            batch_size=stage.config.data.evaluation_batch_size,
            should_stop=stage.should_stop,
        )
        if records is None:
            raise _NoticeCameError
        return records

    return experiment_figures(stage.experiment, measure)


def _is_other(report: Path, name: str, content: bytes) -> bool:
    path = report.with_name(name)
    return not path.is_file() or path.read_bytes() != content
