"""``holdfast simulate``, with records that a run left, and with figures alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.flows.command_line.group import exit_code_of
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.runs.directory import (
    RunDirectory,
    RunRecord,
    SegmentRecord,
    utc_now,
    write_run_record_once,
    write_segment,
)

FIGURES = {
    "--num-steps": "10000",
    "--step-s": "0.5",
    "--save-s": "0.05",
    "--durable-s": "1",
    "--start-s": "10",
}
GIVEN = [word for name, value in FIGURES.items() for word in (name, value)]
TRACE = "0,add,a\n600000,add,b\n1200000,remove,a\n3000000,add,c\n3600000,remove,b\n"


def segment(number: int, steps: tuple[int, int], **changes: Any) -> SegmentRecord:
    fields: dict[str, Any] = {
        "number": number,
        "started_at": f"2026-01-31T{number:02d}:00:04Z",
        "ended_at": f"2026-01-31T{number:02d}:10:00Z",
        "outcome": "completed",
        "start_step": steps[0],
        "end_step": steps[1],
        "costs_s": {"startup": 4.0, "restore": 1.0, "useful": 585.0, "saving": 10.0},
        "save_s": {"snapshot_mean": 0.25, "durable_mean": 2.0},
        "host": "here",
        "pid": 1,
    }
    return SegmentRecord(**{**fields, **changes})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    run = RunDirectory(tmp_path / "store" / "digits" / "first")
    config = RunConfig().model_dump(mode="json")
    config["experiment"] = {"width": 16}  # settings that only the experiment's class knows
    record = RunRecord(
        run_id="first", experiment="digits", config=config, config_digest="x", created_at=utc_now()
    )
    write_run_record_once(run, record)
    write_segment(run, segment(1, (0, 1170), outcome="preempted"))
    write_segment(run, segment(2, (1170, 2340)))
    return tmp_path / "store"


def trace(folder: Path, content: str = TRACE) -> str:
    path = folder / "trace.csv"
    path.write_text(content)
    return str(path)


def simulated(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert exit_code_of(["simulate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_costs_come_from_the_records_of_a_run(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["first", "--store", str(store), "--trace", trace(tmp_path)]
    found = simulated(capsys, *words)
    costs = found["costs"]
    assert (costs["num_steps"], costs["save_s"], costs["durable_s"]) == (2340, 0.25, 2.0)
    assert costs["step_s"] == pytest.approx(585 / 1170)
    assert costs["start_s"] == 5.0
    assert costs["handover_s"] == 3000.0  # from the end of the first to the start of the second
    assert found["money"] is None
    other = simulated(capsys, *words, "--num-steps", "100", "--handover-s", "7")["costs"]
    assert (other["num_steps"], other["handover_s"], other["save_s"]) == (100, 7.0, 0.25)


def test_the_page_tells_the_time_the_interval_and_the_money(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = ["prices.spot_per_hour=1", "prices.on_demand_per_hour=3"]
    words = [word for price in prices for word in ("--set", price)]
    asked = ["simulate", "first", "--store", str(store), "--trace", trace(tmp_path), *words]
    assert exit_code_of([*asked, "--handover-s", "8"]) == 0
    told = capsys.readouterr().out
    for word in ("trace.csv, 3 machines in 60 min", "useful share", "best interval", "USD paid"):
        assert word in told


def test_long_times_are_told_in_figures_that_one_reads(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--mean-life-s", "1e8", *GIVEN, "--step-s", "50000"]
    assert exit_code_of(words) == 0
    told = capsys.readouterr().out
    assert "5,787 d in all" in told
    assert "e+" not in told


def test_a_run_that_never_ends_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--mean-life-s", "10", *GIVEN, "--start-s", "500"]
    assert exit_code_of(words) == 0
    assert "never: no interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "machines come from --trace FILE or have --mean-life-s"),
        (["--mean-life-s", "5", "--trace", "x.csv"], "give one"),
        (["--mean-life-s", "0"], "'--mean-life-s': 0.0 is not in the range"),
        (["--mean-life-s", "inf"], "'--mean-life-s': inf is not in the range"),
        (["--mean-life-s", "nan"], "'--mean-life-s': nan is no number"),
        (["--mean-life-s", "9", "--set", "prices.spot_per_hour=0"], "spot_per_hour = 0"),
        (["--mean-life-s", "9", "--set", "prices.spot_per_hour=-2"], "greater than 0"),
        (["--mean-life-s", "9", "--set", "prices.on_demand_per_hour=2"], "set both"),
        (["--mean-life-s", "9", "--without-notice", "2"], "--without-notice"),
        (["--mean-life-s", "9", "--set", "prices.spot_per_hour=1e300"], "less than or equal to"),
        (["--mean-life-s", "9", "--without-notice", "nan"], "--without-notice"),
        (["--mean-life-s", "9", "--notice-s", "nan"], "nan is no number"),
        (["--mean-life-s", "9", "--set", "train.num_epochs=3"], "train.num_epochs is not reckoned"),
        (["--mean-life-s", "9", "--set", "optimizer.args.lr=1"], "optimizer.args is not reckoned"),
        (["--mean-life-s", "9", "--step-s", "0"], "step_s must be above 0"),
        (["--trace", "none.csv"], "there is no trace none.csv"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(["simulate", *GIVEN, *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_saves_after_so_many_steps_are_reckoned_with(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mean-life-s", "9000", *GIVEN]
    often = simulated(capsys, *words, "--set", "checkpoint.every_steps=10")
    assert often["costs"]["epoch_steps"] == 10
    assert often["online"]["mean"]["saving_s"] > 10000 / 10 * 0.05
    both = ["--epoch-steps", "7", "--set", "checkpoint.every_steps=10"]
    assert simulated(capsys, *words, *both)["costs"]["epoch_steps"] == 7


def test_what_nothing_tells_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(["simulate", "--mean-life-s", "9", *GIVEN[:4]]) == 2
    assert "do not tell --save-s, --durable-s, --start-s" in capsys.readouterr().err
