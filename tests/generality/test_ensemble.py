"""An ensemble from the checkpoints to the bundle, the same bytes however it was stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from holdfast.training.bundles import consumer
from holdfast.training.bundles.promotion import compare_bundles
from holdfast.training.bundles.registry import Registry
from holdfast.training.champion.candidate_plan import plan_candidates
from holdfast.training.configuration.loading import config_from_record
from holdfast.training.runs.directory import read_run_record
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.stage import StageArguments, prepared_stage
from tests.faults.campaign import Training, complete
from tests.generality.harness import OFTEN, stop_after

EXPERIMENT = f"{Path(__file__).with_name('noisy_points.py')}:Classified"
ALL = 'export.formats=["weights","onnx","torchscript","exported_program","onnx_int8"]'
OVERRIDES = (
    *OFTEN,
    "export.num_latency_runs=10",
    "export.int8_min_agreement=0",
    "export.int8_max_metric_change=1",
    ALL,
    'selection.candidates=["ensemble"]',
    "selection.num_bootstrap=100",
    "checkpoint.weights_every_steps=5",
    "selection.should_recompute_batch_norm=false",
    "optimizer.args.lr=0.05",
    "train.num_epochs=8",
)
STAGES = ("candidates", "evaluate", "export", "promote", "report")


def published(training: Training) -> RunDirectory:
    """Take a finished training to its bundle, in the registry, and to its report."""
    for stage in STAGES:
        segment = training.start(stage=stage)
        assert segment.finish() == 0, f"{stage}: {''.join(segment.errors)}"
    return training.run


def files(folder: Path) -> dict[str, bytes]:
    """All files but those that hold times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "latency.json")
    }


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    training = Training(tmp_path_factory.mktemp("calm"), "one", EXPERIMENT, OVERRIDES)
    complete(training)
    return published(training)


@pytest.mark.slow
def test_an_ensemble_is_a_candidate_of_its_own(calm: RunDirectory) -> None:
    evaluation = json.loads(calm.evaluation_json.read_text())
    names = [entry["name"] for entry in evaluation["candidates"]]
    assert names == ["best", "last", "ensemble-top-3"]
    config = config_from_record(read_run_record(calm).config)
    asked = {"should_recompute_batch_norm": True, "candidates": ("average", "ensemble")}
    selection = config.selection.model_copy(update=asked)
    planned = plan_candidates(calm, config.model_copy(update={"selection": selection}))
    assert [one.name for one in planned if one.base] == ["average-top-3-bn"], "no statistics change"
    entry = evaluation["candidates"][-1]
    assert entry["validation"]["loss"] > 0
    single = load_file(calm.candidates / "best" / "model.safetensors")
    several = load_file(calm.candidates / "ensemble-top-3" / "model.safetensors")
    assert set(several) == {f"members.{n}.{name}" for n in range(3) for name in single}
    latency = json.loads((calm.candidates / "ensemble-top-3" / "latency.json").read_text())
    assert latency["batch-1"]["p50_ms"] > latency["batch-1"]["single_best_p50_ms"] > 0


@pytest.mark.slow
def test_an_ensemble_is_exported_in_every_format(calm: RunDirectory) -> None:
    evaluation = json.loads(calm.evaluation_json.read_text())
    assert evaluation["champion"]["name"] == "ensemble-top-3", "the fixture's seed lets it win"
    manifest = consumer.verify_files(calm.bundle)
    assert sorted(manifest["formats"]) == sorted(json.loads(ALL.partition("=")[2]))
    parity = json.loads((calm.bundle / "parity.json").read_text())
    assert all(row["is_passed"] for row in parity["artifacts"])
    card = (calm.bundle / "README.md").read_text()
    assert "It is an ensemble: 3 models of one training" in card
    command = [sys.executable, "-P", str(calm.bundle / "verify.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "golden outputs are right" in done.stdout
    assert (
        Registry(calm.path.parents[1]).position("noisy_points.Classified", "champion") is not None
    )
    assert "times as long as one of the single best" in calm.report_html.read_text()


@pytest.mark.slow
def test_ensembles_are_compared_without_onnx_too(calm: RunDirectory, tmp_path: Path) -> None:
    """A promotion reads the weights of all members where there is no ONNX file."""
    bare = Path(shutil.copytree(calm.bundle, tmp_path / "bare", ignore=lambda *_: {"1"}))
    store = calm.path.parents[1]
    told = StageArguments(EXPERIMENT, store, "one", 1, overrides=OVERRIDES, progress_format="none")
    with prepared_stage(told) as stage:
        found = compare_bundles(bare, calm.bundle, stage.experiment, stage.config)
    assert found.new == pytest.approx(found.holder, rel=1e-5)


@pytest.mark.slow
def test_an_ensemble_is_the_same_however_the_training_was_stopped(
    calm: RunDirectory, tmp_path: Path
) -> None:
    stopped = Training(tmp_path, "one", EXPERIMENT, OVERRIDES)
    for number, step in ((signal.SIGKILL, 11), (signal.SIGTERM, 27)):
        stop_after(stopped, number, step)
    complete(stopped)
    for stage in ("candidates", "evaluate"):
        segment = stopped.start(stage=stage)
        assert segment.finish() == 0, "".join(segment.errors)
    assert files(stopped.run.candidates) == files(calm.candidates)
