"""The report stage: whatever moment of a run it is called at, and however the run came there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from holdfast.training.champion.candidates import run_candidates
from holdfast.training.champion.selection import run_evaluation
from holdfast.training.configuration.schema import PricesConfig, Split
from holdfast.training.experiment.protocol import Dataset
from holdfast.training.reporting.facts import read_facts
from holdfast.training.reporting.markup import VARIES
from holdfast.training.reporting.page import page
from holdfast.training.reporting.stage import run_report
from holdfast.training.spikes.rollbacks import LeftOut, Rollback
from holdfast.training.stage import Stage, StageArguments, prepared_stage
from tests.faults.campaign import Training, complete, kill_at_fault_point

EXPERIMENT = f"{Path(__file__).with_name('report_experiment.py')}:Reported"
OVERRIDES = (
    "train.num_epochs=4",
    "train.num_microbatches=1",
    "data.batch_size=128",
    "checkpoint.is_auto=false",
    "selection.num_bootstrap=100",
)
FAULT_POINT = "commit.before-manifest"


def arguments(store: Path, *overrides: str, is_resume: bool = False) -> StageArguments:
    return StageArguments(
        experiment=EXPERIMENT,
        store=store,
        run_id="one",
        num_threads=1,
        overrides=overrides,
        is_resume=is_resume,
        progress_format="none",
    )


@contextmanager
def resumed(store: Path) -> Iterator[Stage]:
    with prepared_stage(arguments(store, is_resume=True)) as stage:
        yield stage


def evaluated(store: Path) -> None:
    for run_stage in (run_candidates, run_evaluation):
        with resumed(store) as stage:
            assert run_stage(stage).exit_code == 0


def report(store: Path) -> Path:
    with resumed(store) as stage:
        assert run_report(stage).exit_code == 0
        return stage.run.report_html


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nobody interrupted, evaluated."""
    store = tmp_path_factory.mktemp("calm")
    complete(Training(store, "one", overrides=OVERRIDES, experiment=EXPERIMENT))
    evaluated(store)
    return store


class Lasting(HTMLParser):
    """The page without what may differ between an interrupted run and a calm one."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self._depth = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "meta":
            return
        if self._depth or VARIES in dict(attrs):
            self._depth += 1
        else:
            self.parts.append(self.get_starttag_text() or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._depth:
            self.parts.append(self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        if self._depth:
            self._depth -= 1
        else:
            self.parts.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self.parts.append(data)


def test_an_interrupted_run_has_the_same_report_but_for_times_and_segments(
    calm: Path, tmp_path: Path
) -> None:
    killed = Training(tmp_path, "one", overrides=OVERRIDES, experiment=EXPERIMENT)
    assert kill_at_fault_point(killed, FAULT_POINT, 2)
    # Over before the first step: the segment restores, and is told to go.
    segment = killed.start(arguments=("--set", "preemption.max_wall_time_s=0.001"))
    assert segment.finish() == 75
    complete(killed)
    evaluated(tmp_path)
    one, other = (report(store).read_text() for store in (calm, tmp_path))
    assert "a segment was" not in one
    assert "1 preempted, 1 killed" in other
    assert Lasting(one).parts == Lasting(other).parts
    assert any("Confusion" in part or "Right and wrong" in part for part in Lasting(one).parts)


def test_a_report_that_says_the_same_is_left_alone(calm: Path) -> None:
    path = report(calm)
    before, content = path.stat(), path.read_bytes()
    again = report(calm)
    assert again.stat().st_mtime_ns == before.st_mtime_ns
    assert again.stat().st_ino == before.st_ino
    path.unlink()
    assert report(calm).read_bytes() == content


def test_the_learning_rate_is_the_one_of_each_step_and_one_that_overflowed_is_left_out(
    calm: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(calm, tmp_path / "store"))
    with resumed(store) as stage:
        facts = read_facts(stage.run, stage.record, stage.config)
        num_steps = facts.history[-1].step
        assert [step for step, _ in facts.rates[""]] == list(range(num_steps + 1))
        newest = stage.run.checkpoint(num_steps) / "state.json"
        state = json.loads(newest.read_text())
        state["scheduler"]["trace"]["points"][3][1] = {"$float": "inf"}
        newest.write_text(json.dumps(state))
        facts = read_facts(stage.run, stage.record, stage.config)
        assert [step for step, _ in facts.rates[""] if step < 5] == [0, 1, 2, 4]
        assert "learning rate" in page(facts)


def test_the_page_has_a_line_of_money_where_prices_are_configured(calm: Path) -> None:
    prices = PricesConfig(spot_per_hour=0.92, on_demand_per_hour=3.06)
    with resumed(calm) as stage:
        assert "Money" not in page(read_facts(stage.run, stage.record, stage.config))
        config = stage.config.model_copy(update={"prices": prices})
        told = page(read_facts(stage.run, stage.record, config))
    assert "USD paid, " in told
    assert "USD on demand." in told


def test_the_page_names_each_spike_and_what_was_left_out(calm: Path) -> None:
    with resumed(calm) as stage:
        facts = read_facts(stage.run, stage.record, stage.config)
    spikes = [Rollback(21, 14, "the loss of step 21 is not finite", 1), Rollback(30, 30, "x", 2)]
    told = page(replace(facts, left_out=LeftOut(spikes)))
    assert "The loss of step 21 is not finite: steps 14 to 21 were left out." in told
    assert "X: it was left out." in told
    assert "left out" not in page(facts)


def test_the_stage_says_where_the_report_is(calm: Path) -> None:
    said = []
    with resumed(calm) as stage:
        stage.progress.listeners.append(lambda event, values: said.append((event, dict(values))))
        run_report(stage)
    assert said == [("report", {"path": str(stage.run.report_html)})]


def test_the_report_opens_no_test_data(calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with resumed(calm) as stage:
        own = stage.experiment.dataset

        def dataset(split: Split) -> Dataset:
            assert split != "test"
            return own(split)

        monkeypatch.setattr(stage.experiment, "dataset", dataset)
        stage.run.report_html.unlink(missing_ok=True)
        assert run_report(stage).exit_code == 0
        assert "64 validation points" in stage.run.report_html.read_text()


def test_a_notice_while_the_champion_predicts_ends_the_stage(
    calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with resumed(calm) as stage:
        stage.run.report_html.unlink(missing_ok=True)
        monkeypatch.setattr(Stage, "should_stop", lambda _: True)
        assert run_report(stage).outcome == "preempted"
        assert not stage.run.report_html.exists()


def test_an_unfinished_run_has_a_report_of_what_there_is(tmp_path: Path) -> None:
    training = Training(tmp_path, "one", overrides=OVERRIDES, experiment=EXPERIMENT)
    assert kill_at_fault_point(training, FAULT_POINT, 2)
    content = report(tmp_path).read_text()
    assert "No champion yet: 1 of 4 epochs done" in content
    assert "learning rate" in content
    assert "no bundle" in content
