"""Facts of a run that never was, with everything that a page can show."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime

from holdfast.training.configuration.schema import RunConfig
from holdfast.training.reporting.facts import (
    CandidateFacts,
    Epoch,
    Estimate,
    RunFacts,
    SegmentFacts,
    TestFacts,
)
from holdfast.training.reporting.figures import Confusion, Panel, Sentence, Sentences, Series
from holdfast.training.runs.directory import LedgerOutcome, RunRecord, SegmentRecord
from holdfast.training.runs.ledger import ledger, lives


def moment(at_s: float) -> str:
    return datetime.fromtimestamp(1_800_000_000 + at_s, UTC).isoformat()


def segment(number: int, steps: tuple[int, int], lived_s: tuple[float, float]) -> SegmentRecord:
    return SegmentRecord(
        number=number,
        started_at=moment(lived_s[0] + 4),
        ended_at=moment(lived_s[1]),
        start_step=steps[0],
        end_step=steps[1],
        notice={"source": "signal", "reason": "SIGTERM"} if number == 1 else None,
        costs_s={"startup": 4.0, "restore": 1.0, "saving": 2.0},
        host="spot-7",
        pid=1,
        versions={"torch": "2.0"},
    )


def new_facts() -> RunFacts:
    """A run that has only just been begun."""
    config = RunConfig()
    record = RunRecord(
        run_id="first",
        experiment="digits",
        config=config.model_dump(mode="json"),
        config_digest="sha256:" + "ab" * 32,
        data_fingerprint="0123456789abcdef",
        versions={"torch": "2.0"},
        num_threads=2,
        created_at=moment(0),
    )
    return RunFacts(record=record, config=config)


def segments() -> tuple[SegmentFacts, ...]:
    records = [segment(1, (0, 120), (0, 60)), segment(2, (120, 260), (75, 140))]
    records.append(segment(3, (240, 400), (141, 230)))
    outcomes: tuple[LedgerOutcome, ...] = ("preempted", "killed", "completed")
    rows = zip(records, lives(records), outcomes, strict=True)
    return tuple(SegmentFacts(*row) for row in rows)


def candidate(name: str, kind: str, steps: tuple[int, ...], loss: float | None) -> CandidateFacts:
    validation = {"loss": loss, "accuracy": 0.98}
    return CandidateFacts(name, kind, steps, "sha256:" + "cd" * 32, (), validation)


def full_facts() -> RunFacts:
    """A run that came to its end, with one figure of each kind."""
    found = segments()
    epochs = tuple(
        Epoch(step, 2 * 0.7**i + 0.05, {"loss": 2 * 0.72**i + 0.03, "accuracy": 0.9})
        for i, step in enumerate(range(20, 401, 20))
    )
    test = TestFacts(
        champion={"loss": Estimate(0.0234, 0.012, 0.038), "accuracy": Estimate(0.99, 0.98, 1.0)},
        single_best={"loss": Estimate(0.0251, 0.013, 0.04), "accuracy": Estimate(0.99, 0.97, 1.0)},
        difference={"loss": Estimate(-0.0017, -0.0031, -0.0002)},
        single_best_name="best",
        confidence=0.95,
        unit="sample",
    )
    artifact = {"format": "onnx", "name": "1/model.onnx", "is_passed": True, "max_error": 5e-7}
    times = {"p50_ms": 0.061, "p99_ms": 0.1, "eager_p50_ms": 0.23, "eager_p99_ms": 0.29}
    return replace(
        new_facts(),
        segments=found,
        ledger=ledger([one.record for one in found]),
        history=epochs,
        rates={"": tuple((step, 1e-3 * min(1, step / 60) * 0.99**step) for step in range(400))},
        candidates=(
            candidate("best", "best", (380,), 0.0261),
            candidate("last", "last", (400,), 0.0302),
            candidate("ema-decay-0.98", "ema", (400,), None),
            candidate("average-top-5", "average", (300, 340, 360, 380, 400), 0.0243),
        ),
        champion="average-top-5",
        rule="the best loss (min) on validation data",
        test=test,
        exports=({**artifact, "bound": 5e-6, "size_bytes": 63994, "latency": {"batch-1": times}},),
        promotion={
            "alias": "champion",
            "is_promoted": False,
            "name": "pictures",
            "reason": "version 3 held it; worse: loss 0.03 against the holder's 0.02",
            "version": 4,
        },
        figures=(confusion(), series(), sentences()),
    )


def confusion() -> Confusion:
    counts = ((35, 0, 1), (0, 30, 0), (2, 0, 33))
    return Confusion("Confusion matrix", "101 images", ("cat", "dog", "eel"), counts)


def series() -> Series:
    truth = tuple((float(x), min(125.0, 200.0 - x)) for x in range(1, 201))
    guess = tuple((x, y + 9 * math.sin(x / 9)) for x, y in truth)
    panels = tuple(Panel(f"engine {number}", truth, guess) for number in range(1, 4))
    return Series("Remaining useful life", "3 engines", "cycle", "cycles", panels)


def sentences() -> Sentences:
    row = Sentence("zwei und vierzig", "forty-two", "forty two")
    return Sentences("Translations", "1 validation sentence", (row,))
