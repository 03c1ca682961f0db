"""What happens to a run of several machines when one of them, or a part of it, is lost."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from holdfast.tasks.run_summary import summarize
from holdfast.training.exactness.trial import Trial
from holdfast.training.machines.note import FolderBoard
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.losses import compare_losses
from tests.faults.campaign import Segment, Training, complete, differences, final_state
from tests.network import network
from tests.training.ranks.machines import (
    ALL_THREE,
    AT_ONCE,
    BOTH,
    END_S,
    PATIENCE_S,
    SPREAD,
    THREE,
    Guest,
    first_of,
    wait_for_steps,
)
from tests.training.ranks.test_several_processes import LONG, SHARDED, training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def assert_machine_lost(segment: Segment, told: str = "guest (127.0.0.1) with ranks 2, 3") -> None:
    start_s = time.monotonic()
    assert segment.finish() == 1, "".join(segment.errors)
    assert time.monotonic() - start_s < END_S
    error = segment.events[-1]["error"]
    assert error["type"] == "MachineLostError", error
    assert f"machine {told}" in error["message"]
    assert " is lost: " in error["message"]
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


def test_three_machines_go_on_as_two_where_one_is_killed(
    tmp_path: Path, guests: list[Guest]
) -> None:
    calm = training(tmp_path, "calm", *SHARDED, "train.num_epochs=6")
    complete(calm)
    run = training(tmp_path, "lost", *SHARDED, "train.num_epochs=6")
    guests += [Guest(run, name=name) for name in ("second", "third")]
    segment = first_of(run, *THREE, *ALL_THREE)
    wait_for_steps(segment)
    guests[1].vanish()
    assert_machine_lost(segment, "third (127.0.0.1) with rank ")
    guests[0].says("waiting until lost is started")
    segment = first_of(run, *THREE, *BOTH, *AT_ONCE)
    assert segment.finish() == 0, "".join(segment.errors)
    assert guests[0].finish() == 0, guests[0].log()
    assert differences(final_state(calm.run), final_state(run.run)) == []
    assert compare_losses(run.run).num_different == 0
    assert [record.num_machines for record in read_segments(run.run)] == [3, 2]
    assert_no_crash(run)


def test_guests_meet_where_another_machine_takes_the_run_over(
    tmp_path: Path, guests: list[Guest]
) -> None:
    overrides = (*SHARDED, "train.num_epochs=6", "preemption.lease_ttl_s=5")
    calm = training(tmp_path, "calm", *overrides)
    complete(calm)
    run = training(tmp_path, "moved", *overrides)
    guests += [Guest(run, name=name) for name in ("second", "third")]
    segment = first_of(run, *THREE, *ALL_THREE)
    wait_for_steps(segment)
    segment.kill(signal.SIGKILL)
    assert segment.finish() == -signal.SIGKILL
    for guest in guests:
        guest.says("waiting until moved is started")
    time.sleep(5)  # nobody knows on another machine that the one which had the lease is gone
    segment = first_of(run, *THREE, *ALL_THREE, name="fourth")
    assert segment.finish() == 0, "".join(segment.errors)
    assert [guest.finish() for guest in guests] == [0, 0]
    assert differences(final_state(calm.run), final_state(run.run)) == []
    assert [record.num_machines for record in read_segments(run.run)] == [3, 3]
    assert [record.outcome for record in read_segments(run.run)] == ["running", "completed"]


def test_a_rank_that_hangs_on_another_machine_ends_all_and_the_run_goes_on(
    tmp_path: Path, guests: list[Guest]
) -> None:
    hang_s = 10.0
    overrides = (*SHARDED, "train.num_epochs=6", f"distributed.hang_timeout_s={hang_s:g}")
    calm = training(tmp_path, "calm", *overrides)
    complete(calm)
    run = training(tmp_path, "hung", *overrides)
    guests.append(Guest(run, trial=Trial(stop_at=20, stop_signal="SIGSTOP", rank=3)))
    segment = first_of(run, *BOTH)
    wait_for_steps(segment, 15)
    start_s = time.monotonic()
    assert segment.finish() == 1, "".join(segment.errors)
    assert time.monotonic() - start_s < hang_s + END_S
    [line] = [line for line in segment.errors if line.startswith("error: ")]
    assert "nothing new has happened for" in line
    guests[0].says("have ended")
    guests[0].vanish()
    guests.append(Guest(run))
    segment = first_of(run, *BOTH)
    assert segment.finish() == 0, "".join(segment.errors)
    assert guests[1].finish() == 0, guests[1].log()
    assert differences(final_state(calm.run), final_state(run.run)) == []
    assert compare_losses(run.run).num_different == 0


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
