"""Segments of several machines, as users start them; a machine is what one command has started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.tasks.run_summary import summarize
from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.exactness.trial import Trial
from holdfast.training.machines.note import FolderBoard
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.losses import compare_losses
from holdfast.training.storage.address import Address
from holdfast.training.tiers.viewing import ALL, refresh_view
from tests.contracts.object_servers import make_bucket, moto
from tests.faults.campaign import Segment, Training, complete, differences, final_state
from tests.flows.prefect_server import wait_until
from tests.network import Namespace, network
from tests.training.ranks.test_several_processes import EXPERIMENTS, LONG, OFTEN, SHARDED, training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PATIENCE_S = 120.0
END_S = 40.0
"""What docs/several_processes.md says of how soon all have ended."""
TWO = ("distributed.max_machines=2", "distributed.num_processes=2", "distributed.grow_after_s=0")
AT_ONCE = ("distributed.machines_wait_s=0",)
BOTH = ("distributed.min_machines=2",)
SPREAD = (*OFTEN, "distributed.strategy=fsdp", "data.should_drop_last=true")
OTHER = f"""
import sys
sys.path.insert(0, {str(EXPERIMENTS.parent)!r})
from hard_experiment import HardInShards as Hard

class HardInShards(Hard):
    version = VERSION
"""


class Guest:
    """Another machine: ``join``, and the ranks that it starts."""

    def __init__(
        self,
        training: Training,
        folder: Path | None = None,
        network: Namespace | None = None,
        trial: Trial | None = None,
        scratch: str = "",
    ) -> None:
        self.log_path = Path(folder or training.store) / f"guest-{time.monotonic_ns()}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = python_command(
            "holdfast.training", "join", training.run_id, "--store", str(training.store)
        )
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*(network.prefix if network else []), *command],
                env={
                    **child_environment(1),
                    "HOLDFAST_HOST": "guest",
                    "HOLDFAST_SCRATCH": scratch,
                    **(trial.environment() if trial else {}),
                },
                cwd=folder,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        return self.log_path.read_text()

    def says(self, text: str) -> None:
        """Wait until it has said so."""
        wait_until(lambda: text in self.log(), PATIENCE_S, text, self.log)

    def vanish(self) -> None:
        """SIGKILL to it and its ranks."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> int:
        """Its exit code, once it has ended by itself."""
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def guests() -> Iterator[list[Guest]]:
    """Those that are left end with the test."""
    started: list[Guest] = []
    yield started
    for guest in started:
        if guest.process.poll() is None:
            guest.vanish()


def first_of(
    training: Training,
    *overrides: str,
    address: str = "127.0.0.1",
    trial: Trial | None = None,
    scratch: str = "",
) -> Segment:
    """The machine that the run is started on."""
    told = [part for override in (*TWO, *overrides) for part in ("--set", override)]
    named = {"HOLDFAST_ADDRESS": address, "HOLDFAST_HOST": "first", "HOLDFAST_SCRATCH": scratch}
    return training.start({**named, **(trial.environment() if trial else {})}, told)


def wait_for_steps(segment: Segment, num: int = 3) -> None:
    for _ in range(num):
        assert segment.wait_for("progress") is not None, "".join(segment.errors)


def assert_machine_lost(segment: Segment) -> None:
    start_s = time.monotonic()
    assert segment.finish() == 1, "".join(segment.errors)
    assert time.monotonic() - start_s < END_S
    error = segment.events[-1]["error"]
    assert error["type"] == "MachineLostError", error
    assert "machine guest (127.0.0.1) with ranks 2, 3 is lost" in error["message"]
    assert len([line for line in segment.errors if line.startswith("error: ")]) == 1


def assert_no_crash(training: Training) -> None:
    """A lost machine counts as a preemption wherever segments are counted."""
    lost = [record for record in read_segments(training.run) if record.outcome == "failed"]
    assert [record.error and record.error.type for record in lost] == ["MachineLostError"]
    assert summarize(training.run).num_crashes == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_with_one_machine_and_with_two_again(
    tmp_path: Path, guests: list[Guest], strategy: str
) -> None:
    shards = (*(SHARDED if strategy == "ddp" else (*SPREAD, "distributed.num_shards=4")),)
    overrides = (*shards, "train.num_epochs=12")
    calm = training(tmp_path, "calm", *overrides)
    complete(calm)
    lost = training(tmp_path, "lost", *overrides)
    guests.append(Guest(lost))
    segment = first_of(lost, *BOTH)
    wait_for_steps(segment)
    guests[0].vanish()
    assert_machine_lost(segment)
    guests.append(Guest(lost))
    guests[1].says("waiting until lost is started")
    segment = first_of(lost, *AT_ONCE)
    assert segment.finish() == 0, "".join(segment.errors)
    assert guests[1].finish() == 0, guests[1].log()
    assert differences(final_state(calm.run), final_state(lost.run)) == []
    assert compare_losses(lost.run).num_different == 0
    records = read_segments(lost.run)
    assert [record.num_processes for record in records] == [4, 2, 4]
    assert [record.num_machines for record in records] == [2, None, 2]
    assert [record.outcome for record in records] == ["failed", "preempted", "completed"]
    assert records[1].notice is not None
    assert records[1].notice["source"] == "newcomer"
    assert "guest (127.0.0.1) has come" in records[1].notice["reason"]
    assert_no_crash(lost)
    logs = {path.name for path in lost.run.logs.iterdir()}
    assert not [name for name in logs if "rank-2" in name or "rank-3" in name]
    note = FolderBoard(lost.store).read(f"{lost.run.path.parent.name}/lost")
    assert note is not None
    assert note.state == "completed"


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


def test_the_machine_with_the_meeting_place_is_lost_and_comes_back(
    tmp_path: Path, guests: list[Guest]
) -> None:
    run = training(tmp_path, "first", *SHARDED, "train.num_epochs=6")
    guests.append(Guest(run))
    trial = Trial(stop_at=5, stop_signal="SIGKILL")
    assert first_of(run, *BOTH, trial=trial).finish() == -signal.SIGKILL
    guests[0].says("waiting until first is started")
    assert first_of(run, *BOTH).finish() == 0
    assert guests[0].finish() == 0, guests[0].log()
    calm = training(tmp_path, "calm", *SHARDED, "train.num_epochs=6")
    complete(calm)
    assert differences(final_state(calm.run), final_state(run.run)) == []


def test_an_error_of_a_rank_of_another_machine_is_told_with_its_rank(
    tmp_path: Path, guests: list[Guest]
) -> None:
    run = training(tmp_path, "killed", *SHARDED, *LONG)
    guests.append(Guest(run, trial=Trial(stop_at=5, stop_signal="SIGKILL", rank=3)))
    segment = first_of(run, *BOTH)
    start_s = time.monotonic()
    assert segment.finish() == 1
    assert time.monotonic() - start_s < PATIENCE_S
    error = segment.events[-1]["error"]
    assert error["type"] == "RankLostError"
    assert "rank 3 (process " in error["message"]
    assert "was ended by SIGKILL" in error["message"]
    guests[0].says("the ranks here have ended with [-9, 1]")


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


def test_a_machine_whose_cable_is_cut_is_lost_in_time(tmp_path: Path, guests: list[Guest]) -> None:
    with network() as switch:
        there = switch.plug_in()
        run = training(tmp_path, "cut", *SHARDED, *LONG)
        guests.append(Guest(run, network=there))
        segment = first_of(run, *BOTH, address=switch.address)
        wait_for_steps(segment)
        there.cut()
        start_s = time.monotonic()
        assert segment.finish() == 1, "".join(segment.errors)
        print(f"ended {time.monotonic() - start_s:.1f} s after the cable was cut")
        assert time.monotonic() - start_s < END_S
        assert (
            f"machine guest ({there.address}) with ranks 2, 3 is lost: nothing was heard"
            in (segment.events[-1]["error"]["message"])
        )
        assert_no_crash(run)
        guests[0].says(f"the machine at {switch.address} that the run was started on is lost")
        guests[0].vanish()
