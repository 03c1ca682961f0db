"""The choice of the champion: on validation data, by a rule that is fixed beforehand.

``candidates/choice.json`` holds the choice, durable before test data is opened, so that nothing
that comes later can change it. Then the champion and the single best checkpoint meet the test data,
and ``evaluation.json`` tells both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from holdfast.training.averages.ensemble import experiment_of
from holdfast.training.champion.bootstrap import (
    CONFIDENCE,
    Resampled,
    finite,
    interval,
    resampled_metrics,
    units_of,
    unknown_spread,
)
from holdfast.training.champion.candidate_plan import used_steps
from holdfast.training.champion.candidates import (
    DIGEST,
    LATENCY_NAME,
    PROVENANCE_NAME,
    WEIGHTS_NAME,
    Candidate,
    made_digest,
    plan_candidates,
    preempted,
)
from holdfast.training.champion.latency import BATCH_SIZES, measure
from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.tensor_file import parse_tensors
from holdfast.training.configuration.schema import Json, Split
from holdfast.training.errors import DataFormatError, SelectionError
from holdfast.training.exactness.seeding import derive_seed, seed_generators
from holdfast.training.experiment.model_call import call_form
from holdfast.training.experiment.protocol import (
    Dataset,
    Records,
    example_inputs,
    has_test_data,
)
from holdfast.training.loop.evaluation import evaluate, metrics_of
from holdfast.training.loop.experiment_state import experiment_checkpoint, restore_experiment
from holdfast.training.loop.record_file import RecordFile
from holdfast.training.loop.train_step import resolve_device
from holdfast.training.optimizers.schedule import named_metric
from holdfast.training.runs.fenced import publish_json
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.stored_json import (
    Kinds,
    read_json,
    required_fields,
    shape_expected,
)
from holdfast.training.stage import Stage, StageOutcome
from holdfast.training.weights.frozen import load_saved

CHOICE_NAME = "choice.json"
CHOICE: Kinds = {
    "candidates": (list,),
    "champion": (dict,),
    "single_best": (str,),
    "test": (dict, type(None)),
}
RULE = (
    "the best {metric} ({mode}) on validation data; of equal ones the first in the list, which "
    "begins with the simplest: the single best checkpoint comes before every average"
)
Mode = Literal["min", "max"]
Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Made:
    """A candidate that is there, the digest of its file, and the checkpoints that are in it."""

    candidate: Candidate
    digest: str
    steps: Sequence[int]


@dataclass(frozen=True)
class Measured(Made):
    """A candidate with its validation metrics; a metric that is not finite is None."""

    validation: Metrics


def run_evaluation(stage: Stage) -> StageOutcome:
    """Measure the candidates, choose the champion, test it: ``evaluation.json``.

    What was measured before is not measured again; a choice of the same candidates stands; a
    finished evaluation of them is left as it is.

    Raises:
        SelectionError: a candidate is missing, or none has a finite metric.
        ConfigError: ``selection.metric`` is not a metric.
    """
    made = _made(stage)
    if _known(stage.run.evaluation_json, made) is not None:
        return StageOutcome("completed", 0)
    restore_experiment(stage.experiment, experiment_checkpoint(stage.run))
    with stage.writing() as lease:
        choice = _choice(stage, lease, made)
        _measure_latencies(stage, lease, made)
        has_test = has_test_data(stage.experiment)
        test = _test(stage, lease, made, choice) if choice is not None and has_test else None
        if choice is None or (test is None and has_test):
            return preempted(stage)
        publish_json(lease, stage.run.evaluation_json, {**choice, "test": test})
    champion = choice["champion"]["name"]
    test_metrics = {} if test is None else test["metrics"]
    stage.progress.emit("chosen", champion=champion, test_metrics=test_metrics)
    return StageOutcome("completed", 0)


def choose(measured: Sequence[Measured], metric: str, mode: Mode) -> Measured:
    """The champion. Of equal ones the first; a metric that is not finite never wins.

    The simplest candidates come first, and so an average wins only where it is better than the
    single best checkpoint. Raises SelectionError where no candidate has a finite metric.
    """
    sign = 1.0 if mode == "min" else -1.0
    ranked = [
        (sign * value, place)
        for place, one in enumerate(measured)
        if (value := one.validation.get(metric)) is not None and math.isfinite(value)
    ]
    if not ranked:
        raise SelectionError(
            f"no candidate has a finite validation {metric}: {[m.candidate.name for m in measured]}"
        )
    return measured[min(ranked)[1]]


def single_best(measured: Sequence[Measured]) -> Measured:
    """The best single checkpoint; the last one where no epoch's end was measured."""
    by_kind = {one.candidate.kind: one for one in measured}
    return by_kind.get("best") or by_kind["last"]


def choice_json(measured: Sequence[Measured], metric: str, mode: Mode) -> dict[str, Any]:
    """What ``evaluation.json`` says before test data is opened: all scores, who won, and why.

    There are no times in it, so the same run gives the same bytes.
    """
    champion, best = choose(measured, metric, mode), single_best(measured)
    return {
        "candidates": [_entry(one) for one in measured],
        "champion": {**_entry(champion), "metrics": champion.validation},
        "format_version": 1,
        "reason": _reason(measured, champion, best, metric, mode),
        "rule": RULE.format(metric=metric, mode=mode),
        "single_best": best.candidate.name,
    }


def _reason(
    measured: Sequence[Measured], champion: Measured, best: Measured, metric: str, mode: Mode
) -> str:
    """The champion's metric beside the single best's, or the next one's where that is champion."""
    told = f"{champion.candidate.name} has validation {metric} {champion.validation[metric]}"
    rival, rank = best, "the single best checkpoint"
    if champion is best:
        others = [
            one for one in measured if one is not best and one.validation.get(metric) is not None
        ]
        if not others:
            return told
        rival, rank = choose(others, metric, mode), "the next"
    told += f"; {rank} ({rival.candidate.name}) has {rival.validation[metric]}"
    if rival.validation[metric] == champion.validation[metric]:
        told += ", and of equal ones the simpler wins"
    return told


def difference_json(
    metrics: Sequence[Mapping[str, float]], resampled: Sequence[Resampled]
) -> dict[str, Any]:
    """For each metric the first minus the last one's, its limits, and if zero is outside."""
    found = {}
    for name, value in metrics[0].items():
        spread = resampled[0][name] - resampled[-1][name]
        limits = interval(value - metrics[-1][name], spread)
        found[name] = {**asdict(limits), "excludes_zero": limits.excludes_zero}
    return found


def _entry(one: Measured) -> dict[str, Any]:
    return {
        "digest": one.digest,
        "kind": one.candidate.kind,
        "name": one.candidate.name,
        "path": f"candidates/{one.candidate.name}/{WEIGHTS_NAME}",
        "steps": list(one.steps),
        "validation": one.validation,
    }


def _made(stage: Stage) -> list[Made]:
    made = []
    for candidate in plan_candidates(stage.run, stage.config):
        digest = made_digest(stage.run, candidate)
        if digest is None:
            raise SelectionError(
                f"the candidate {candidate.name} is missing in {stage.run.candidates}, or was "
                "altered: run the stage 'candidates' first"
            )
        provenance: Any = read_json(stage.run.candidates / candidate.name / PROVENANCE_NAME)
        made.append(Made(candidate, digest, used_steps(provenance)))
    return made


def _known(path: Path, made: Sequence[Made]) -> dict[str, Any] | None:
    """A choice or an evaluation, if it is of these candidates."""
    try:
        known = required_fields(read_json(path), path, CHOICE)
        with shape_expected(path):
            found = [(entry["name"], entry["digest"]) for entry in known["candidates"]]
            chosen = {str(known["champion"]["name"]), known["single_best"]}
    except (FileNotFoundError, DataFormatError):
        return None
    is_theirs = found == [(one.candidate.name, one.digest) for one in made]
    return known if is_theirs and chosen <= {name for name, _ in found} else None


def _choice(stage: Stage, lease: Lease, made: Sequence[Made]) -> dict[str, Any] | None:
    """The choice, durable; None where a notice came first."""
    path = stage.run.candidates / CHOICE_NAME
    choice = _known(path, made)
    if choice is not None:
        return choice
    selection, measured = stage.config.selection, []
    dataset = stage.experiment.dataset("validation")
    for number, one in enumerate(made):
        _say(stage, number, len(made) + 1, f"measure {one.candidate.name}")
        records = _records(stage, lease, one, "validation", dataset)
        if records is None:
            return None
        metrics = metrics_of(stage.experiment, records)
        named_metric(metrics, selection.metric, "selection.metric")
        measured.append(Measured(one.candidate, one.digest, one.steps, _finite(metrics)))
    choice = choice_json(measured, selection.metric, selection.mode)
    publish_json(lease, path, choice)
    return choice


def _measure_latencies(stage: Stage, lease: Lease, made: Sequence[Made]) -> None:
    """``latency.json`` of each ensemble, beside the single best; what is there stays."""
    by_kind = {one.candidate.kind: one for one in made}
    ensemble = by_kind.get("ensemble")
    if ensemble is None or stage.should_stop():
        return
    path = stage.run.candidates / ensemble.candidate.name / LATENCY_NAME
    if path.exists():
        return
    _say(stage, len(made), len(made) + 1, f"time {ensemble.candidate.name}")
    rows = example_inputs(stage.experiment, max(BATCH_SIZES))
    single = _model(stage, by_kind.get("best") or by_kind["last"]).cpu().eval()
    several = _model(stage, ensemble).cpu().eval()
    form = call_form(stage.experiment, single)
    measured = measure(
        lambda inputs: form.call(several, inputs),
        lambda inputs: form.call(single, inputs),
        rows,
        stage.config.export.num_latency_runs,
        beside="single_best",
    )
    publish_json(lease, path, measured)


def _test(
    stage: Stage, lease: Lease, made: Sequence[Made], choice: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Champion and single best on test data; the only place that opens it, once."""
    _say(stage, len(made), len(made) + 1, "test the champion")
    experiment, dataset = stage.experiment, stage.experiment.dataset("test")
    by_name = {one.candidate.name: one for one in made}
    found = []
    # One model where the single best is the champion: then every difference is zero.
    for name in dict.fromkeys([choice["champion"]["name"], choice["single_best"]]):
        records = _records(stage, lease, by_name[name], "test", dataset)
        if records is None:
            return None
        found.append(records)
    metrics = [metrics_of(experiment, records) for records in found]
    units = units_of(experiment, found[0])
    resampled = (
        unknown_spread(metrics)
        if len(units) == 1
        else resampled_metrics(
            experiment,
            found,
            num_resamples=stage.config.selection.num_bootstrap,
            seed=derive_seed(stage.config.seed, "bootstrap"),
            should_stop=stage.should_stop,
        )
    )
    if resampled is None:
        return None
    return {
        **_tested(metrics[0], resampled[0]),
        "bootstrap": {
            "confidence": CONFIDENCE,
            "num_resamples": stage.config.selection.num_bootstrap,
            "num_units": len(units),
            "unit": units.record or "sample",
        },
        "difference": difference_json(metrics, resampled),
        "single_best": {**_tested(metrics[-1], resampled[-1]), "name": choice["single_best"]},
    }


def _tested(metrics: Mapping[str, float], resampled: Resampled) -> dict[str, Any]:
    intervals = {name: asdict(interval(value, resampled[name])) for name, value in metrics.items()}
    return {"intervals": intervals, "metrics": _finite(metrics)}


def _finite(metrics: Mapping[str, float]) -> Metrics:
    return {name: finite(value) for name, value in metrics.items()}


def _records(
    stage: Stage, lease: Lease, one: Made, split: Split, dataset: Dataset
) -> Records | None:
    """Records of a candidate on a data set; what an earlier process scored is not scored again."""
    batch_size = stage.config.data.evaluation_batch_size
    key: dict[str, Json] = {
        "batch_size": batch_size,
        "candidate": one.digest,
        "data": str(getattr(dataset, "fingerprint", None)),
        "num_samples": len(dataset),
    }
    path = stage.run.candidates / one.candidate.name / f"{split}.safetensors"
    return evaluate(
        stage.experiment,
        _model(stage, one),
        dataset,
        batch_size=batch_size,
        should_stop=stage.should_stop,
        kept=RecordFile(path, key, lease, stage.config.selection.save_every_s),
    )


def _model(stage: Stage, one: Made) -> nn.Module:
    path = stage.run.candidates / one.candidate.name / WEIGHTS_NAME
    content, digest = read_file(path, DIGEST, None)
    if digest != one.digest:
        raise SelectionError(
            f"{path} has the digest {digest}; it had {one.digest} a moment ago: somebody changes "
            "the candidates while they are measured"
        )
    seed_generators(stage.seed("model"))
    model = experiment_of(stage.experiment, one.candidate.name).model()
    weights, config = parse_tensors(content, str(path)), stage.config.checkpoint
    load_saved(model, weights, config, experiment_checkpoint(stage.run))
    return model.to(resolve_device(stage.config.train.device))


def _say(stage: Stage, num_done: int, total: int, message: str) -> None:
    stage.progress.emit("progress", stage="evaluate", done=num_done, total=total, message=message)
