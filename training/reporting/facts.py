"""What the report tells, read from a run's directory. Whatever is not there yet is empty."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from holdfast.training.bundles.summary import artifact_rows, promotion_fields
from holdfast.training.certificate.kept import KeptCertificate, read_certificate
from holdfast.training.champion.candidate_plan import used_steps
from holdfast.training.champion.candidates import LATENCY_NAME
from holdfast.training.checkpointing.json_state import decode
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.optimizers.rate_trace import RateTrace
from holdfast.training.reporting.figures import Figure
from holdfast.training.runs.directory import (
    LedgerOutcome,
    Lineage,
    RunDirectory,
    RunRecord,
    SegmentRecord,
    ledger_outcome,
    parse_step,
    read_segments,
)
from holdfast.training.runs.durable_json import json_bytes, without_nan
from holdfast.training.runs.ledger import Ledger, Life, ledger, lives
from holdfast.training.runs.losses import ComparedLosses, compare_losses, with_known_ends
from holdfast.training.runs.stored_json import (
    RECORD,
    STATE,
    Limits,
    read_json,
    shape_expected,
)
from holdfast.training.simulation.money import Money, money_of
from holdfast.training.spikes.rollbacks import LeftOut, read_rollbacks

Metrics = Mapping[str, float | None]


HISTORY_COLUMNS = ("epoch", "step", "train_loss", "learning_rate")


@dataclass(frozen=True)
class Estimate:
    """A figure, with the limits of its interval where one was measured."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Epoch:
    """One finished epoch: its last step, and finite values by name."""

    step: int
    train_loss: float | None
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class CandidateFacts:
    """One candidate; ``validation`` is empty until it was measured.

    ``slowdown`` of an ensemble is the time of a call, of one sample, divided by a single model's.
    """

    name: str
    kind: str
    steps: tuple[int, ...]
    digest: str
    notes: tuple[str, ...]
    validation: Metrics
    slowdown: float | None = None


@dataclass(frozen=True)
class TestFacts:
    """Champion and single best on test data; ``difference`` is the first minus the second."""

    champion: Mapping[str, Estimate]
    single_best: Mapping[str, Estimate]
    difference: Mapping[str, Estimate]
    single_best_name: str
    confidence: float | None
    unit: str


@dataclass(frozen=True)
class SegmentFacts:
    """One segment: its record, its place on the time axis, and what became of it."""

    record: SegmentRecord
    life: Life
    outcome: LedgerOutcome


@dataclass(frozen=True)
class RunFacts:
    """All that a page is made from; the same facts give the same page.

    Attributes:
        rates: steps and their learning rates, by parameter group; of one without a name alone.
        left_out: steps that were left out because a loss spiked.
        champion: name of the candidate that won; None until it was chosen.
        exports: artifacts with parity, size and latency; empty where there is no bundle.
        num_epochs: finished ones of a script's ``run.epochs``; 0 where it has none.
        promotion: content of ``promotion.json``; empty where the bundle was not published.
    """

    record: RunRecord
    config: RunConfig
    segments: tuple[SegmentFacts, ...] = ()
    ledger: Ledger = field(default_factory=lambda: ledger([]))
    money: Money | None = None
    losses: ComparedLosses = field(default_factory=ComparedLosses)
    certificate: KeptCertificate | None = None
    history: tuple[Epoch, ...] = ()
    left_out: LeftOut = field(default_factory=LeftOut)
    rates: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    candidates: tuple[CandidateFacts, ...] = ()
    champion: str | None = None
    rule: str = ""
    test: TestFacts | None = None
    exports: tuple[Mapping[str, Any], ...] = ()
    promotion: Mapping[str, Any] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    num_epochs: int = 0

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.config.selection.metric

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether small or large values of it are good."""
        return self.config.selection.mode

    def candidate(self, name: str | None) -> CandidateFacts | None:
        """The candidate of a name."""
        return next((one for one in self.candidates if one.name == name), None)


def read_facts(run: RunDirectory, record: RunRecord, config: RunConfig) -> RunFacts:
    """The facts of a run that nobody is writing, without figures.

    Raises DataFormatError or StorageError where a file is not readable.
    """
    records = with_known_ends(read_segments(run), run)
    state, spent = newest_state(run), ledger(records)
    evaluation = _mapping(_optional(run.evaluation_json))
    promotion = _optional(run.promotion_json)
    with shape_expected(run.checkpoints):
        history, rates = tuple(map(_epoch, state.get("history", ()))), _rates(state, record.lineage)
    with shape_expected(run.evaluation_json):
        candidates, test = _candidates(run, evaluation), _test(evaluation)
    return RunFacts(
        record=record,
        config=config,
        segments=tuple(
            SegmentFacts(one, life, ledger_outcome(one, is_alive=False))
            for one, life in zip(records, lives(records), strict=True)
        ),
        ledger=spent,
        money=money_of(spent, config.prices),
        losses=compare_losses(run),
        certificate=read_certificate(run, record),
        history=history,
        left_out=read_rollbacks(run),
        rates=rates,
        candidates=candidates,
        champion=_mapping(evaluation.get("champion")).get("name"),
        rule=str(evaluation.get("rule", "")),
        test=test,
        exports=tuple(artifact_rows(run.bundle)),
        num_epochs=_epochs_of_script(state),
        promotion={} if promotion is None else promotion_fields(promotion, run.promotion_json),
    )


def newest_state(run: RunDirectory) -> dict[str, Any]:
    """``state.json`` of the newest checkpoint that can be resumed from; empty without one."""
    names = [path.name for path in run.checkpoints.iterdir()] if run.checkpoints.is_dir() else []
    steps = sorted((step for step in map(parse_step, names) if step is not None), reverse=True)
    for step in steps:
        state = _mapping(_optional(run.checkpoint(step) / "state.json", STATE))
        if state:
            return state
    return {}


def history_files(run: RunDirectory, *, is_script: bool = False) -> dict[str, bytes]:
    """Both files by name, from the newest checkpoint that can be resumed from.

    One row for each epoch that has ended, or for each validation of a script, by its number.
    ``nan`` and ``inf`` are written as text. Empty where there is none yet.
    """
    history = newest_state(run).get("history", ())
    rows = [_history_row(decode(entry, {}), is_script=is_script) for entry in history]
    if not rows:
        return {}
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return {"history.json": json_bytes(without_nan(rows)), "history.csv": text.getvalue().encode()}


def _epochs_of_script(state: Mapping[str, Any]) -> int:
    place = _mapping(_mapping(state.get("experiment")).get("place"))
    epochs = _number(place.get("epoch"))
    return 0 if epochs is None else int(epochs)


def _history_row(entry: Mapping[str, Any], *, is_script: bool) -> dict[str, Any]:
    columns = {name: entry.get(name) for name in HISTORY_COLUMNS}
    if is_script:
        columns = {"validation": entry["epoch"] + 1, **columns}
        del columns["epoch"]
    return {**columns, **entry["metrics"]}


def _epoch(entry: Mapping[str, Any]) -> Epoch:
    metrics = {name: _number(value) for name, value in entry["metrics"].items()}
    return Epoch(
        step=int(entry["step"]),
        train_loss=_number(entry.get("train_loss")),
        metrics={name: value for name, value in metrics.items() if value is not None},
    )


def _rates(
    state: Mapping[str, Any], lineage: Lineage | None
) -> dict[str, tuple[tuple[int, float], ...]]:
    """The rates of each parameter group by its name; of one that has none alone.

    A schedule that began anew with a fork counts from there.
    """
    first = lineage.step if lineage is not None and lineage.has_new_rates else 0
    scheduler = _mapping(state.get("scheduler"))
    traces = _mapping(scheduler.get("traces")) or {"": scheduler.get("trace")}
    return {label: _points(RateTrace.restored(trace), first) for label, trace in traces.items()}


def _points(trace: RateTrace, first: int) -> tuple[tuple[int, float], ...]:
    known = ((first + step, _number(rate)) for step, rate in trace.points)
    return tuple((step, rate) for step, rate in known if rate is not None)


def _candidates(run: RunDirectory, evaluation: Mapping[str, Any]) -> tuple[CandidateFacts, ...]:
    """Those that were measured, in that order; before, those that were made, by name."""
    made = {path.parent.name: path for path in sorted(run.candidates.glob("*/provenance.json"))}
    measured = {entry["name"]: entry for entry in evaluation.get("candidates", ())}
    return tuple(
        replace(
            _candidate(
                _mapping(_optional(made[name])) if name in made else {}, measured.get(name, {})
            ),
            slowdown=_slowdown(run.candidates / name / LATENCY_NAME),
        )
        for name in (measured or made)
    )


def _slowdown(path: Path) -> float | None:
    """Of what an evaluation measured of an ensemble; None where there is nothing."""
    one = _mapping(_mapping(_optional(path)).get("batch-1"))
    own, other = _number(one.get("p50_ms")), _number(one.get("single_best_p50_ms"))
    return own / other if own and other else None


def _candidate(provenance: Mapping[str, Any], measured: Mapping[str, Any]) -> CandidateFacts:
    both = {**provenance, **measured}
    steps = both.get("steps") or (used_steps(provenance) if provenance else [])
    return CandidateFacts(
        name=str(both["name"]),
        kind=str(both["kind"]),
        steps=tuple(steps),
        digest=str(both["digest"]),
        notes=tuple(map(str, both.get("notes", ()))),
        validation={name: _number(v) for name, v in measured.get("validation", {}).items()},
    )


def _test(evaluation: Mapping[str, Any]) -> TestFacts | None:
    test = _mapping(evaluation.get("test"))
    if not test:
        return None
    best = _mapping(test.get("single_best"))
    bootstrap = _mapping(test.get("bootstrap"))
    return TestFacts(
        champion=_estimates(test),
        single_best=_estimates(best),
        difference=_intervals(_mapping(test.get("difference"))),
        single_best_name=str(best.get("name", "")),
        confidence=_number(bootstrap.get("confidence")),
        unit=str(bootstrap.get("unit", "sample")),
    )


def _estimates(tested: Mapping[str, Any]) -> dict[str, Estimate]:
    """Metrics with their intervals, where there are any."""
    plain = {name: {"value": value} for name, value in _mapping(tested.get("metrics")).items()}
    return _intervals({**plain, **_mapping(tested.get("intervals"))})


def _intervals(found: Mapping[str, Any]) -> dict[str, Estimate]:
    estimates = {}
    for name, entry in found.items():
        value = _number(entry.get("value"))
        if value is not None:
            low, high = _number(entry.get("low")), _number(entry.get("high"))
            estimates[name] = Estimate(value, low, high)
    return estimates


def _number(value: Any) -> float | None:
    """A finite number; what JSON cannot say (NaN, infinity) is written as an object."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _optional(path: Path, limits: Limits = RECORD) -> Any:
    try:
        return read_json(path, limits)
    except FileNotFoundError:
        return None
