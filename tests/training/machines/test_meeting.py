"""Machines that meet, over a real store on loopback."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.training.configuration.schema import DistributedConfig
from holdfast.training.distributed.launcher import Ended, RankEnd
from holdfast.training.distributed.seat import Seat
from holdfast.training.distributed.world import World
from holdfast.training.errors import MachineLostError
from holdfast.training.machines.meeting import Meeting, opened_meeting
from holdfast.training.machines.note import FolderBoard
from holdfast.training.machines.visit import Visit, visited
from holdfast.training.runs.paths import RunDirectory
from tests.flows.prefect_server import wait_until

RANGE = DistributedConfig(
    strategy="ddp", num_shards=8, max_machines=3, machines_wait_s=0, grow_after_s=0
)
WELL = Ended((RankEnd(0, 1, 0, False, None, ()),))
BADLY = Ended((RankEnd(0, 1, 1, False, None, ()),))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("HOLDFAST_ADDRESS", "127.0.0.1")
    return RunDirectory(tmp_path / "digits" / "first")


def come(stack: ExitStack, meeting: Meeting) -> Visit:
    return stack.enter_context(visited(meeting.note))


def soon(is_there: Callable[[], object]) -> None:
    wait_until(lambda: bool(is_there()), 30, "it happens")


def test_machines_of_a_range_start_with_those_that_are_there(run: RunDirectory) -> None:
    with opened_meeting(run, "digits", RANGE) as meeting, ExitStack() as stack:
        board = FolderBoard(run.path.parent.parent)
        assert board.read("digits/first") == meeting.note
        first = come(stack, meeting)
        assert meeting.gather(lambda: False)
        assert meeting.machines == [0, 1]
        place = meeting.begin({"config": 7})
        assert (place.size, place.first_rank, place.interface) == (2, 0, "lo")
        soon(lambda: first.is_invited)
        assert first.start is not None
        assert first.start["config"] == 7
        there = first.place()
        assert (there.size, there.first_rank, there.num_here) == (2, 1, 1)
        assert meeting.lost() is first.lost() is meeting.newcomer() is None
        late = come(stack, meeting)
        soon(lambda: late.start)
        assert not late.is_invited
        soon(meeting.newcomer)
        first.report({"ranks": []})
        assert meeting.reports(WELL) == ([{"ranks": []}], None)
    left = board.read("digits/first")
    assert left is not None
    assert left.state == "away"


def test_too_few_are_waited_for_until_a_notice_comes(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    config = RANGE.model_copy(update={"min_machines": 2})
    with opened_meeting(run, "digits", config) as meeting:
        answers = iter([False, False, True])
        assert not meeting.gather(lambda: next(answers))
    assert "1 of at least 2 are there; start `holdfast join first` on others" in caplog.text


def test_a_machine_that_is_silent_is_lost(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOST_S", "GONE_S"):
        monkeypatch.setattr(f"holdfast.training.machines.meeting.{name}", 1.0)
    with opened_meeting(run, "digits", RANGE) as meeting, ExitStack() as stack:
        come(stack, meeting), come(stack, meeting)
        assert meeting.gather(lambda: False)
        meeting.begin({})
        stack.pop_all().close()
        soon(meeting.lost)
        assert "with rank 1 is lost: nothing was heard of it for 1 s" in (meeting.lost() or "")
        reports, lost = meeting.reports(BADLY)
        assert reports == []
        assert "rank 1 is lost" in (lost or "")


def test_a_rank_that_waits_for_a_machine_hears_that_it_is_gone(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.training.machines.meeting.GONE_S", 1.0)
    with opened_meeting(run, "digits", RANGE) as meeting, ExitStack() as stack:
        come(stack, meeting)
        assert meeting.gather(lambda: False)
        place = meeting.begin({})
        world = World(0, place.size, place.store.clone())
        world.seat = Seat(0, place.size, place.host, place.store.port, 0, "", 30.0, 0, 1)
        assert meeting.gone() is None
        stack.pop_all().close()
        soon(meeting.gone)
        for wait in (world.told, world.awaited):
            with pytest.raises(MachineLostError, match=r"another machine is lost.* with rank 1 is"):
                wait("what that machine does not write any more")


def test_the_others_hear_that_the_ranks_of_one_have_failed(run: RunDirectory) -> None:
    with opened_meeting(run, "digits", RANGE) as meeting, ExitStack() as stack:
        one, other = come(stack, meeting), come(stack, meeting)
        assert meeting.gather(lambda: False)
        meeting.begin({})
        one.report({"ranks": [{"exit_code": -9}]})
        soon(meeting.lost)
        assert "have ended with [-9]" in (meeting.lost() or "")
        assert one.lost() is None
        meeting.tell_end(BADLY)
        soon(other.lost)
        other.report({"ranks": []})
        assert len(meeting.reports(BADLY)[0]) == 2


def test_a_meeting_whose_machine_is_gone_is_over(run: RunDirectory) -> None:
    with ExitStack() as stack:
        with opened_meeting(run, "digits", RANGE) as meeting:
            visit = come(stack, meeting)
        del meeting
        soon(lambda: visit.is_over)
        assert "the machine at 127.0.0.1 that the run was started on is lost" in (
            visit.lost() or ""
        )
