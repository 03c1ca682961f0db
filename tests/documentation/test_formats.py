"""docs/formats.md names every field and every file that the code writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from holdfast.tasks.attempts import AttemptLog
from holdfast.training.averages.soup import GreedyStep
from holdfast.training.bundles.promotion import PromotionDecision
from holdfast.training.bundles.registry import AliasMove
from holdfast.training.certificate.kept import KeptCertificate
from holdfast.training.champion.candidate_plan import Candidate, Source
from holdfast.training.champion.candidates import run_candidates
from holdfast.training.champion.selection import Measured, choice_json, run_evaluation
from holdfast.training.checkpointing.manifest import DIGEST_KEY, FileEntry, Manifest
from holdfast.training.code.archive import index_json
from holdfast.training.exactness.seeding import capture_generators
from holdfast.training.loop.early_stopping import EarlyStopping
from holdfast.training.loop.segment import run_segment
from holdfast.training.loop.state import Counters, EpochRecord
from holdfast.training.parity.parity import ArtifactReport
from holdfast.training.preemption.notices import Notice
from holdfast.training.runs.directory import Lineage, RunRecord, SegmentError, SegmentRecord
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.spikes.rollbacks import Rollback
from holdfast.training.stage import StageArguments, prepared_stage
from tests.documentation.pages import REPOSITORY, field_tables, file_tables

PAGE = REPOSITORY / "docs" / "formats.md"
TABLES = field_tables(PAGE)
EXPERIMENT = f"{REPOSITORY / 'tests/training/reporting/report_experiment.py'}:Reported"
OVERRIDES = (
    "train.num_epochs=3",
    "data.batch_size=128",
    "selection.num_bootstrap=100",
    "logging.tensorboard=true",
)
COSTS = {"startup", "restore", "useful", "saving", "evaluating"}


def names(kind: Any) -> set[str]:
    """Fields of a dataclass."""
    return {field.name for field in fields(kind)}


MEASURED = Measured(Candidate("best", "best", ()), "sha256:0", (1,), {"loss": 0.5})
CHOICE = choice_json([MEASURED], "loss", "min")
WRITTEN: dict[str, Iterable[str]] = {
    "RunRecord": RunRecord.model_fields,
    "Lineage": Lineage.model_fields,
    "SegmentRecord": SegmentRecord.model_fields,
    "SegmentError": SegmentError.model_fields,
    "Notice.as_record": Notice("signal", "SIGTERM", None).as_record(0.0),
    "Manifest": {*Manifest.model_fields, DIGEST_KEY},
    "FileEntry": FileEntry.model_fields,
    "Counters": names(Counters),
    "EpochRecord": names(EpochRecord),
    "EarlyStopping": names(EarlyStopping),
    "Rollback": names(Rollback),
    "Source": names(Source),
    "GreedyStep": names(GreedyStep),
    "choice": CHOICE,
    "choice.candidates": CHOICE["candidates"][0],
    "ArtifactReport.as_json": ArtifactReport("onnx").as_json(),
    "KeptCertificate": names(KeptCertificate),
    "PromotionDecision": names(PromotionDecision),
    "code": index_json("sha256:0", "train.py", {}),
    "AliasMove": names(AliasMove) - {"number"},  # the file's name
    "generators": {*capture_generators(), "torch.cuda.<n>", "loss_sum"},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_page_names_the_fields_that_the_code_has(name: str) -> None:
    assert sorted(TABLES[name]) == sorted(WRITTEN[name])


def test_the_page_names_the_fields_of_a_lease(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with Lease.acquire(run, 20.0):
        content = json.loads(next(run.lease.iterdir()).read_text())
    assert sorted(TABLES["lease"]) == sorted(content)


def test_the_page_names_the_fields_of_an_attempt(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    log = AttemptLog(run, "segment", "flow")
    log.begin()
    log.end("failed", 1, "error")
    lines = (run.logs / "attempts.jsonl").read_text().splitlines()
    written = {key for line in lines if line for key in json.loads(line)}
    assert sorted(TABLES["attempts"]) == sorted(written)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run from its start to its evaluation."""
    arguments = StageArguments(
        experiment=EXPERIMENT,
        store=tmp_path_factory.mktemp("store"),
        run_id="one",
        num_threads=1,
        overrides=OVERRIDES,
        progress_format="none",
    )
    for run_stage in (run_segment, run_candidates, run_evaluation):
        with prepared_stage(arguments) as stage:
            assert run_stage(stage).exit_code == 0
    return arguments.run


def test_the_page_names_every_file_of_a_run(run: RunDirectory) -> None:
    tables = file_tables(PAGE)
    inner = {
        "checkpoints/step-<step>/": tables["checkpoint"],
        "candidates/<name>/": tables["candidate"],
    }
    patterns = [_pattern(path + name) for path in tables["run"] for name in inner.get(path, [""])]
    found = [
        path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()
    ]
    assert len(found) > 20
    assert [name for name in found if not any(p.fullmatch(name) for p in patterns)] == []


def test_the_page_names_the_content_of_a_run(run: RunDirectory) -> None:
    checkpoint = sorted(run.checkpoints.iterdir())[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    provenance = json.loads((run.candidates / "best" / "provenance.json").read_text())
    evaluation = json.loads(run.evaluation_json.read_text())
    assert sorted(TABLES["state.json"]) == sorted(state)
    assert sorted(TABLES["provenance"]) == sorted(provenance)
    assert sorted([*TABLES["choice"], "test"]) == sorted(evaluation)
    assert sorted(TABLES["test"]) == sorted(evaluation["test"])
    assert {*SegmentRecord.model_validate_json(run.segment(1).read_text()).costs_s} <= COSTS


def _pattern(path: str) -> re.Pattern[str]:
    """A path of the page's tables, as a pattern for real ones."""
    return re.compile(re.sub(r"<[^>]*>", "[^/]+", path.replace(".", r"\.")))
