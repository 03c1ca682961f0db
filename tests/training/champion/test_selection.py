"""The choice: on validation data, durable before test data is opened, whoever is killed when."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.champion.candidate_plan import Candidate, Kind, Source
from holdfast.training.champion.candidates import run_candidates
from holdfast.training.champion.selection import (
    Measured,
    choice_json,
    choose,
    run_evaluation,
    single_best,
)
from holdfast.training.errors import ConfigError, SelectionError
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.loop.segment import run_segment
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.stage import Stage, StageArguments, prepared_stage
from tests.training.champion.watched_experiment import DEED, LOG
from tests.warm_start import WarmProcess

REFERENCE = f"{Path(__file__).with_name('watched_experiment.py')}:Watched"
NAME = "watched_experiment.Watched"
NUM_BATCHES = 8
TIMEOUT_S = 240.0


# --- the rule


def measured(kind: Kind, value: float | None, number: int = 0) -> Measured:
    candidate = Candidate(
        f"{kind}-{number}", kind, (Source(number, "model.safetensors", "digest"),)
    )
    return Measured(candidate, f"sha256:{number}", (number,), {"loss": value})


values = st.one_of(
    st.none(), st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf]), st.floats(-5, 5)
)


@given(values, st.lists(values, max_size=4), st.lists(values, max_size=4), st.booleans())
def test_the_champion_is_the_simplest_of_the_best(
    best: float | None, emas: list[float | None], averages: list[float | None], is_min: bool
) -> None:
    found = [
        measured("best", best),
        measured("last", 1.0),
        *(measured("ema", value, number) for number, value in enumerate(emas)),
        *(measured("average", value, number) for number, value in enumerate(averages)),
    ]
    champion = choose(found, "loss", "min" if is_min else "max")
    sign = 1 if is_min else -1
    value = champion.validation["loss"]
    assert value is not None
    assert math.isfinite(value)
    for place, one in enumerate(found):
        other = one.validation["loss"]
        if other is None or not math.isfinite(other):
            continue
        assert sign * value <= sign * other
        if place < found.index(champion):
            assert sign * value < sign * other
    if champion.candidate.kind == "average" and best is not None and math.isfinite(best):
        assert sign * value < sign * best


def test_an_equal_or_worse_average_does_not_win() -> None:
    for value in (0.5, 0.6):
        found = [measured("best", 0.5), measured("average", value)]
        assert choose(found, "loss", "min").candidate.kind == "best"


def test_without_a_finite_metric_nothing_is_chosen() -> None:
    found = [measured("best", None), measured("average", math.nan)]
    with pytest.raises(SelectionError, match=r"no candidate has a finite validation loss"):
        choose(found, "loss", "min")


def test_the_last_stands_for_the_single_best_where_no_epoch_was_measured() -> None:
    found = [measured("last", 0.5), measured("average", 0.4)]
    assert single_best(found).candidate.kind == "last"
    assert choice_json(found, "loss", "min")["single_best"] == "last-0"


def test_the_choice_tells_the_rule_all_scores_and_the_reason() -> None:
    choice = choice_json([measured("best", 0.5), measured("ema", 0.25)], "loss", "min")
    assert [entry["validation"] for entry in choice["candidates"]] == [
        {"loss": 0.5},
        {"loss": 0.25},
    ]
    assert choice["champion"]["name"] == "ema-0"
    assert "the best loss (min) on validation data" in choice["rule"]
    assert choice["reason"] == (
        "ema-0 has validation loss 0.25; the single best checkpoint (best-0) has 0.5"
    )


@pytest.mark.parametrize(
    ("value", "end"), [(0.75, "has 0.75"), (0.5, "has 0.5, and of equal ones the simpler wins")]
)
def test_the_reason_names_the_next_where_the_single_best_wins(value: float, end: str) -> None:
    others = [measured("ema", 0.9, 1), measured("average", value, 2)]
    choice = choice_json([measured("best", 0.5), *others], "loss", "min")
    assert choice["reason"] == f"best-0 has validation loss 0.5; the next (average-2) {end}"


# --- the stage, in this process


def arguments(store: Path, *overrides: str) -> StageArguments:
    return StageArguments(
        experiment=REFERENCE,
        store=store,
        run_id="first",
        num_threads=1,
        overrides=overrides,
        progress_format="none",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run that has its candidates."""
    store = tmp_path_factory.mktemp("store")
    for run in (run_segment, run_candidates):
        with prepared_stage(arguments(store)) as stage:
            assert run(stage).outcome == "completed"
    return store


@pytest.fixture(scope="module")
def num_candidates(trained: Path) -> int:
    return sum(path.is_dir() for path in (trained / NAME / "first" / "candidates").iterdir())


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may evaluate."""
    return Path(shutil.copytree(trained, tmp_path / "store"))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv(LOG, str(path))
    return path


def calls(log: Path) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines()]


@contextmanager
def staged(store: Path) -> Iterator[Stage]:
    with prepared_stage(arguments(store)) as stage:
        yield stage


def evaluated(store: Path) -> dict[str, Any]:
    with staged(store) as stage:
        assert run_evaluation(stage).outcome == "completed"
        found: dict[str, Any] = json.loads(stage.run.evaluation_json.read_bytes())
    return found


def test_test_data_is_opened_once_and_after_everything_was_measured(store: Path, log: Path) -> None:
    evaluation = evaluated(store)
    told = calls(log)
    opened = told.index("dataset-test")
    assert told.count("dataset-test") == 1
    assert told[:opened].count("score") == NUM_BATCHES * len(evaluation["candidates"])
    assert told[:opened].count("metrics") == len(evaluation["candidates"])
    assert (store / NAME / "first/candidates/choice.json").is_file()


def test_nothing_before_the_evaluation_opens_test_data(tmp_path: Path, log: Path) -> None:
    for run in (run_segment, run_candidates):
        with prepared_stage(arguments(tmp_path, "train.num_epochs=1")) as stage:
            assert run(stage).outcome == "completed"
    assert "dataset-train" in calls(log)
    assert "dataset-test" not in calls(log)


def test_the_test_metrics_have_intervals_and_the_difference_has_one(store: Path) -> None:
    test = evaluated(store)["test"]
    assert test["bootstrap"] == {
        "confidence": 0.95,
        "num_resamples": 200,
        "num_units": 64,
        "unit": "sample",
    }
    for part in (test, test["single_best"]):
        assert {name: limits["value"] for name, limits in part["intervals"].items()} == (
            part["metrics"]
        )
        for limits in part["intervals"].values():
            assert limits["low"] <= limits["value"] <= limits["high"]
    for name, found in test["difference"].items():
        difference = test["metrics"][name] - test["single_best"]["metrics"][name]
        assert found["value"] == pytest.approx(difference)
        assert found["excludes_zero"] == (not found["low"] <= 0 <= found["high"])


def test_a_finished_evaluation_is_left_as_it_is(store: Path, log: Path) -> None:
    evaluated(store)
    path = store / NAME / "first/evaluation.json"
    before = path.stat().st_mtime_ns
    log.write_text("")
    evaluated(store)
    assert path.stat().st_mtime_ns == before
    assert not {"score", "dataset-test", "metrics"} & set(calls(log))


def test_a_choice_stands_whatever_the_scores_become(store: Path) -> None:
    calm = evaluated(store)
    run = RunDirectory(store / NAME / "first")
    run.evaluation_json.unlink()
    choice_path = run.candidates / "choice.json"
    choice = json.loads(choice_path.read_bytes())
    others = [e for e in choice["candidates"] if e["name"] != choice["champion"]["name"]]
    choice["champion"] = {**others[-1], "metrics": others[-1]["validation"]}
    choice_path.write_text(json.dumps(choice))
    again = evaluated(store)
    assert again["champion"]["name"] == others[-1]["name"] != calm["champion"]["name"]


def test_other_candidates_are_measured_and_chosen_anew(store: Path, log: Path) -> None:
    calm = evaluated(store)
    run = RunDirectory(store / NAME / "first")
    choice_path = run.candidates / "choice.json"
    choice = json.loads(choice_path.read_bytes())
    choice["candidates"][0]["digest"] = "sha256:of-something-else"
    for path in (choice_path, run.evaluation_json):
        path.write_text(json.dumps(choice))
    log.write_text("")
    assert evaluated(store) == calm
    assert "score" not in calls(log)  # their records are still those of the same digests


def test_a_candidate_that_was_altered_is_refused_by_name(store: Path) -> None:
    path = store / NAME / "first/candidates/best/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with staged(store) as stage, pytest.raises(SelectionError, match=r"candidate best is missing"):
        run_evaluation(stage)


def test_a_metric_that_is_none_is_bad_input_and_leaves_test_data_closed(
    tmp_path: Path, log: Path
) -> None:
    overrides = ("train.num_epochs=1", "train.max_steps=1")
    for run in (run_segment, run_candidates):
        with prepared_stage(arguments(tmp_path, *overrides)) as stage:
            run(stage)
    with prepared_stage(arguments(tmp_path, *overrides)) as stage:
        selection = stage.config.selection.model_copy(update={"metric": "f1"})
        config = stage.config.model_copy(update={"selection": selection})
        with pytest.raises(ConfigError, match=r"selection\.metric = 'f1' is not a metric"):
            run_evaluation(replace(stage, config=config))
    assert "dataset-test" not in calls(log)


# --- the stage as a process that is killed


@dataclass(frozen=True)
class Life:
    """One process, and what it told."""

    code: int
    calls: list[str]
    errors: str


def start(store: Path, log: Path, deed: str = "") -> WarmProcess:
    command = ["evaluate", "--experiment", REFERENCE, "--store", str(store), "--run-id", "first"]
    environment = {**child_environment(1), LOG: str(log), DEED: deed or "none none 0"}
    log.write_text("")
    return WarmProcess([*command, "--progress", "none"], environment)


def live(store: Path, log: Path, deed: str = "") -> Life:
    """Run the stage until it ends; ``deed`` is what ends it."""
    process = start(store, log, deed)
    _, errors = process.communicate(TIMEOUT_S)
    assert process.returncode is not None
    return Life(process.returncode, calls(log), errors)


@pytest.fixture(scope="module")
def calm(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """``evaluation.json`` of a process that nobody killed."""
    folder = tmp_path_factory.mktemp("calm")
    store = Path(shutil.copytree(trained, folder / "store"))
    life = live(store, folder / "log")
    assert life.code == 0, life.errors
    return (store / NAME / "first/evaluation.json").read_bytes()


def test_kills_anywhere_lose_little_and_change_no_byte(
    store: Path, tmp_path: Path, calm: bytes, num_candidates: int
) -> None:
    run, log = RunDirectory(store / NAME / "first"), tmp_path / "log"
    choice = run.candidates / "choice.json"
    num_scored = NUM_BATCHES * num_candidates

    # In the third candidate, and the process has no time for anything.
    life = live(store, log, f"SIGKILL score {2 * NUM_BATCHES + 4}")
    assert life.code == -signal.SIGKILL
    assert "dataset-test" not in life.calls
    assert not choice.exists()

    # A notice: what was scored is kept to the batch.
    life = live(store, log, "SIGTERM score 6")
    assert life.code == 75, life.errors
    assert life.calls.count("score") == 6
    assert "dataset-test" not in life.calls

    # All measured, and killed before the choice.
    life = live(store, log, f"SIGKILL metrics {num_candidates}")
    assert life.code == -signal.SIGKILL
    assert life.calls.count("score") <= num_scored - 2 * NUM_BATCHES - 6
    assert "dataset-test" not in life.calls
    assert not choice.exists()

    # After the choice, before test data is opened.
    life = live(store, log, "SIGKILL dataset-test 1")
    assert life.code == -signal.SIGKILL
    assert "score" not in life.calls
    chosen = choice.read_bytes()
    assert not run.evaluation_json.exists()

    # While test data is drawn again.
    life = live(store, log, "SIGTERM metrics 50")
    assert life.code == 75, life.errors
    assert not run.evaluation_json.exists()

    life = live(store, log)
    assert life.code == 0, life.errors
    assert "score" not in life.calls
    assert choice.read_bytes() == chosen
    assert run.evaluation_json.read_bytes() == calm


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kills_at_random_moments_change_no_byte(
    store: Path, tmp_path: Path, calm: bytes, seed: int
) -> None:
    rng, log = random.Random(seed), tmp_path / "log"
    for _ in range(6):
        process = start(store, log)
        # Four of five once it works, the others while it starts.
        should_wait = rng.random() < 0.8
        while should_wait and process.poll() is None and not {"score", "metrics"} & {*calls(log)}:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            os.kill(process.pid, rng.choice([signal.SIGTERM, signal.SIGKILL]))
        process.communicate(TIMEOUT_S)
    life = live(store, log)
    assert life.code == 0, life.errors
    assert (store / NAME / "first/evaluation.json").read_bytes() == calm
