"""Segments of several machines: who takes part, and how all end well."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.exactness.trial import Trial
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.storage.address import Address
from holdfast.training.tiers.viewing import ALL, refresh_view
from tests.contracts.object_servers import make_bucket, moto
from tests.faults.campaign import Training, complete, differences, final_state
from tests.training.ranks.machines import (
    BOTH,
    SPREAD,
    TWO,
    Guest,
    first_of,
    wait_for_steps,
)
from tests.training.ranks.test_several_processes import EXPERIMENTS, LONG, SHARDED, training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
OTHER = f"""
import sys
sys.path.insert(0, {str(EXPERIMENTS.parent)!r})
from hard_experiment import HardInShards as Hard

class HardInShards(Hard):
    version = VERSION
"""


def test_a_notice_on_one_machine_stops_all_after_the_same_step(
    tmp_path: Path, guests: list[Guest]
) -> None:
    run = training(tmp_path, "noticed", *SHARDED, *LONG)
    guests.append(Guest(run))
    segment = first_of(run, *BOTH)
    wait_for_steps(segment)
    guests[0].process.send_signal(signal.SIGTERM)
    assert guests[0].finish() == 75, guests[0].log()
    assert segment.finish() == 75, "".join(segment.errors)
    [record] = read_segments(run.run)
    assert (record.outcome, record.num_machines) == ("preempted", 2)
    assert record.notice is not None
    assert record.notice["source"] == "other_machine"
    assert record.notice["reason"] in ("signal: SIGTERM (rank 2)", "signal: SIGTERM (rank 3)")
    assert run.run.checkpoint(record.end_step).is_dir()


def test_other_code_on_one_machine_is_refused_on_both(tmp_path: Path, guests: list[Guest]) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.py").write_text(OTHER.replace("VERSION", repr(name)))
    run = Training(tmp_path, "other", "task.py:HardInShards", SHARDED)
    guests.append(Guest(run, tmp_path / "there"))
    told = [part for override in (*TWO, *BOTH) for part in ("--set", override)]
    command = ["segment", "--experiment", run.experiment, "--store", str(tmp_path), *told]
    done = subprocess.run(
        [*python_command("holdfast.training", *command), "--run-id", "other"],
        env={**child_environment(1), "HOLDFAST_REHEARSAL_DEPTH": "none"},
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == guests[0].finish() == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "differs from rank" in line
    assert "in experiment_digest" in line
    assert "differs from rank" in guests[0].log()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_machines_that_have_a_bucket_alone_in_common(
    tmp_path: Path, guests: list[Guest], monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
    pytest.importorskip("moto", reason="moto is not installed")
    shards = (*(SHARDED if strategy == "ddp" else (*SPREAD, "distributed.num_shards=4")),)
    overrides = (*shards, "train.num_epochs=4")
    calm = training(tmp_path, "calm", *overrides)
    complete(calm)
    with moto() as server:
        for name, value in server.items():
            monkeypatch.setenv(name, value)
        make_bucket(server, "runs")
        store = "s3://runs/machines"
        lost = training(store, "lost", *overrides)  # type: ignore[arg-type]
        scratch = {name: str(tmp_path / name) for name in ("first", "guest")}
        for stop_at in (8, None):
            trial = Trial(stop_at=stop_at, stop_signal="SIGKILL", rank=3) if stop_at else None
            guests.append(Guest(lost, tmp_path, trial=trial, scratch=scratch["guest"]))
            segment = first_of(lost, *BOTH, scratch=scratch["first"])
            assert segment.finish() == (0 if stop_at is None else 1), "".join(segment.errors)
            if stop_at is not None:
                guests[-1].vanish()
        assert guests[-1].finish() == 0, guests[-1].log()
        monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "watcher"))
        name = f"{calm.run.path.parent.name}/lost"
        found = RunDirectory(
            refresh_view(Address("s3", "runs", "machines"), name, also=(ALL,)) / name
        )
    assert differences(final_state(calm.run), final_state(found)) == []
    assert [record.num_machines for record in read_segments(found)] == [2, 2]
    carried = list((tmp_path / "guest").rglob("manifest.json"))
    assert len(carried) == 1
    assert read_segments(found)[1].start_step > 0


@pytest.fixture(params=["folder", "bucket"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "scratch"))
    if request.param == "folder":
        yield str(tmp_path)
        return
    pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
    pytest.importorskip("moto", reason="moto is not installed")
    with moto() as server:
        for name, value in server.items():
            monkeypatch.setenv(name, value)
        make_bucket(server, "runs")
        yield "s3://runs/machines"


def test_a_run_without_a_meeting_is_told_to_who_joins(
    store: str, tmp_path: Path, guests: list[Guest]
) -> None:
    scratch = str(tmp_path / "scratch")
    alone = training(store, "alone", *SHARDED, "train.num_epochs=2")  # type: ignore[arg-type]
    trial = Trial(stop_at=5, stop_signal="SIGTERM")
    assert alone.start(trial.environment()).finish() == 75
    guests.append(Guest(alone, tmp_path, scratch=scratch))
    guests[0].says("was begun for one machine, with distributed.max_machines=1")
    segment = first_of(alone, *BOTH, scratch=scratch)
    assert segment.finish() == 0, "".join(segment.errors)
    assert guests[0].finish() == 0, guests[0].log()
    trained = training(store, "trained", *SHARDED, "train.num_epochs=1")  # type: ignore[arg-type]
    complete(trained)
    guests.append(Guest(trained, tmp_path, scratch=scratch))
    assert guests[1].finish() == 0, guests[1].log()
    assert guests[1].log().count("\n") == 1
    assert "/trained is trained" in guests[1].log()
