"""Every JSON file of a store may hold anything: readers end, soon, with one typed error at most."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from holdfast.flows.command_line.group import exit_code_of
from holdfast.tasks.attempts import AttemptLog
from holdfast.tasks.engine_lease import engine_directory, engine_lease, read_engine
from holdfast.tasks.run_summary import history_of, summarize
from holdfast.training.bundles.console import main as console_main
from holdfast.training.bundles.registry import BundleReference, Registry
from holdfast.training.bundles.stage import read_champion
from holdfast.training.bundles.summary import artifact_rows
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import HoldfastError
from holdfast.training.reporting.facts import read_facts
from holdfast.training.runs.directory import (
    RunDirectory,
    RunRecord,
    SegmentRecord,
    read_run_record,
    read_segments,
    utc_now,
    write_run_record_once,
    write_segment,
)
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.runs.lease import Lease, read_lease
from tests.safety.hostile import (
    SPECIAL,
    digest_of_tree,
    odd_texts,
    odd_values,
    put_special,
    remove,
    within,
)
from tests.training.bundles.small_bundle import make_bundle

LIMIT_S = 5.0
NUM_ODD_VALUES = 10
EVALUATION: dict[str, Any] = {
    "candidates": [{"name": "last", "digest": "sha256:00", "kind": "last", "steps": [20]}],
    "champion": {"name": "last", "path": "candidates/last/model.safetensors", "digest": "x"},
    "single_best": "last",
    "rule": "the best",
    "test": {
        "metrics": {"loss": 0.5},
        "intervals": {"loss": {"value": 0.5, "low": 0.4, "high": 0.6}},
        "single_best": {"name": "last", "metrics": {"loss": 0.5}},
        "difference": {"loss": {"value": 0.0, "low": 0.0, "high": 0.0}},
        "bootstrap": {"confidence": 0.95, "unit": "sample"},
    },
}
STATE: dict[str, Any] = {
    "counters": {"step": 20, "epoch": 1, "step_in_epoch": 0},
    "history": [{"epoch": 1, "step": 20, "train_loss": 0.5, "metrics": {"loss": 0.5}}],
    "scheduler": {"trace": {"every": 1, "points": [[1, 0.1], [2, 0.1]]}},
}
PROMOTION = {
    "name": "digits",
    "version": 1,
    "alias": "champion",
    "is_promoted": True,
    "reason": "x",
}


def make_run(store: Path, name: str) -> RunDirectory:
    run = RunDirectory(store / "digits" / name)
    write_run_record_once(
        run,
        RunRecord(
            run_id=name,
            experiment="digits",
            config=RunConfig().model_dump(mode="json"),
            config_digest="x",
            seeds={"model": 1},
            created_at=utc_now(),
        ),
    )
    told = {"started_at": utc_now(), "host": "here", "pid": 1, "costs_s": {"startup": 1.0}}
    for number in (1, 2):
        write_segment(run, SegmentRecord(number=number, end_step=10 * number, **told))
    with engine_lease(run, "flow-run", 1, wait_s=0.0), Lease.acquire(run, 20.0):
        pass
    AttemptLog(run, "segment").begin()
    run.candidates.mkdir()
    write_json_durably(run.evaluation_json, EVALUATION)
    write_json_durably(run.promotion_json, PROMOTION)
    run.checkpoint(20).mkdir(parents=True)
    write_json_durably(run.checkpoint(20) / "state.json", STATE)
    make_bundle(run.bundle)
    row = {"format": "onnx", "name": "1/model.onnx", "size_bytes": 3}
    write_json_durably(run.bundle / "parity.json", {"artifacts": [row]})
    return run


def pulled(run: RunDirectory) -> object:
    registry = Registry(run.path.parent.parent)
    return registry.resolve(BundleReference.parse("digits"))


FILES: dict[str, Callable[[RunDirectory], object]] = {
    "run.json": read_run_record,
    "segments/0002.json": read_segments,
    "lease/00000001.json": read_lease,
    ".engine/lease/00000001.json": lambda run: read_lease(engine_directory(run)),
    ".engine/holder.json": read_engine,
    "promotion.json": summarize,
    "evaluation.json": read_champion,
    "logs/attempts.jsonl": lambda run: AttemptLog(run, "segment").read(),
    "checkpoints/step-00000020/state.json": history_of,
    "bundle/parity.json": lambda run: artifact_rows(run.bundle),
    "bundle/manifest.json": lambda run: artifact_rows(run.bundle),
    "../../registry/digits/aliases/champion/000001.json": pulled,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("safety") / "store"
    make_run(store, "poisoned")
    make_run(store, "good")
    registry = Registry(store)
    registry.publish(make_bundle(store.parent / "source"))
    registry.move_alias("digits", "champion", 1, reason="x", after=None)
    (store.parent / "elsewhere").mkdir()
    (store.parent / "elsewhere/precious.json").write_text('{"mine": 1}')
    return store


def judged(run: RunDirectory, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but a typed error comes of it, and the other run is shown."""
    store = run.path.parent.parent
    for read in (FILES[name], summarize, report_facts):
        with suppress(HoldfastError, FileNotFoundError):
            read(run)
    assert exit_code_of(["status", "--store", str(store)]) == 0
    told = capsys.readouterr()
    assert "digits/good" in told.out
    texts = [told.out, told.err]
    if "registry" in name:
        assert console_main(["bundles", "--store", str(store)]) == 0
        told = capsys.readouterr()
        assert "digits@1" in told.out
        texts += [told.out, told.err]
    assert all(text.replace("\n", "").isprintable() for text in texts)


def report_facts(run: RunDirectory) -> object:
    record = RunRecord(
        run_id="x", experiment="digits", config={}, config_digest="x", created_at=utc_now()
    )
    return read_facts(run, record, RunConfig())


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_holds_it_is_one_odd_line(
    store: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(store / "digits/poisoned")
    path = (run.path / name).resolve()
    rng, good = random.Random(name), path.read_bytes()
    outside = digest_of_tree(store.parent / "elsewhere")
    value = json.loads(good)
    cases = {**odd_texts(rng, value), **odd_values(rng, value, NUM_ODD_VALUES)}
    assert len(cases) + len(SPECIAL) >= 35  # times the files: more than 400
    try:
        for what, content in cases.items():
            path.write_bytes(content)
            judge(run, name, what, capsys)
        for kind in SPECIAL:
            put_special(path, kind, store.parent / "elsewhere/precious.json")
            judge(run, name, kind, capsys)
            remove(path)
    finally:
        remove(path)
        path.write_bytes(good)
    assert digest_of_tree(store.parent / "elsewhere") == outside


def judge(run: RunDirectory, name: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with within(LIMIT_S):
            judged(run, name, capsys)
    except Exception as error:
        raise AssertionError(f"{name}, {what}: {type(error).__name__}: {error}") from error
