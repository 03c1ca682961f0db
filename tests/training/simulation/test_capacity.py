"""Traces: what is read, what is refused, and which machine takes a run up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from holdfast.training.errors import InputError
from holdfast.training.simulation.capacity import (
    ExponentialCapacity,
    Machine,
    Trace,
    TraceCapacity,
    read_trace,
)


def written(folder: Path, content: str) -> Path:
    path = folder / "trace.csv"
    path.write_bytes(content.encode())
    return path


def test_rows_are_milliseconds_and_line_ends_may_be_those_of_windows(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, "0,add,a\r\n60000,add,b\r\n120000,remove,a\r\n"))
    assert found.machines == (Machine(0.0, 120.0), Machine(60.0, math.inf))
    assert (found.length_s, found.resolution_s, found.num_gone) == (120.0, 60.0, 1)


@pytest.mark.parametrize(("unit", "length_s"), [("seconds", 3.0), ("minutes", 180.0)])
def test_a_first_row_may_name_the_unit(tmp_path: Path, unit: str, length_s: float) -> None:
    found = read_trace(written(tmp_path, f"{unit},event,machine\n0, add, a\n\n3,remove,a\n"))
    assert found.length_s == length_s


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("5,add,a\n3,remove,a\n", "line 2: the trace runs backwards"),
        ("0,add,a\n1,add,a\n", "line 2: the machine 'a' comes and is there already"),
        ("0,add,a\n1,remove,b\n", "line 2: the machine 'b' goes and was not there"),
        ("0,add,a\n1,remove,a\n2,remove,a\n", "line 3: the machine 'a' goes"),
        ("0,add\n", "line 1 is '0,add'"),
        ("0,come,a\n", "expected a time, add or remove"),
        ("0,add,\n", "expected a time"),
        ("soon,add,a\n", "the time 'soon' is no number"),
        ("-1,add,a\n", "the time '-1' is no number of at least 0"),
        ("nan,add,a\n", "is no number"),
        ("1e30,add,a\n", "is no number"),
        ("weeks,event,machine\n", "'weeks' is no unit of times; allowed"),
        ("0,add,a\n0,remove,a\n", "every machine goes when it comes"),
        ("1767225600000,add,a\n1767232800000,remove,a\n", "line 1: nobody is there for the first"),
        ("seconds,event,machine\n1767225600,add,a\n", "line 2: nobody is there for the first"),
        ("1767225600,add,a\n1767232800,remove,a\n", "take the time of its first row from all"),
        ("0,add,a\x00\n\udce4", ""),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as error:
        read_trace(path)
    assert told in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no trace"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path)


TRACE = Trace((Machine(0, 10), Machine(2, 30), Machine(40, math.inf)), 50)


@pytest.mark.parametrize(
    ("start_s", "at_s", "begin_s", "end_s"),
    [
        (0, 0, 0, 10),  # the one that has been there longest
        (0, 10, 2, 30),
        (0, 35, 40, 50),  # none is there: the next one; at the trace's end it goes, too
        (0, 50, 50, 60),  # the trace again
        (5, 0, -5, 5),
        (5, 8, -3, 25),
        (0, 110, 102, 130),
    ],
)
def test_a_run_takes_what_has_been_there_longest(
    start_s: float, at_s: float, begin_s: float, end_s: float
) -> None:
    found = TraceCapacity(TRACE, start_s).next_machine(at_s)
    assert (found.begin_s, found.end_s) == (begin_s, end_s)


def test_a_machine_that_was_told_takes_nothing_up() -> None:
    trace = TRACE.with_notices(3.0, share_without=0.0, seed=0)
    assert TraceCapacity(trace, 0.0).next_machine(8.0).end_s == 30
    assert TraceCapacity(trace, 0.0).next_machine(6.0).end_s == 10
    with pytest.raises(InputError, match="no machine of the trace lives longer than its notice"):
        TraceCapacity(TRACE.with_notices(60.0, share_without=0.0, seed=0), 0.0)


def test_machines_that_nobody_saw_go_stay() -> None:
    found = TraceCapacity(Trace((Machine(0, math.inf),), 0.0), 0.0).next_machine(1e6)
    assert found.end_s == math.inf


def test_times_are_spread_within_what_was_not_seen() -> None:
    trace = Trace(tuple(Machine(60.0 * n, 60.0 * n + 600) for n in range(50)), 3600, 60.0)
    found = trace.spread(1)
    assert found != trace
    assert found == trace.spread(1)
    assert found != trace.spread(2)
    for before, after in zip(trace.machines, found.machines, strict=True):
        assert before.begin_s - 60 <= after.begin_s <= before.begin_s
        assert before.end_s - 60 <= after.end_s <= before.end_s


def test_times_are_spread_within_a_minute_at_most(tmp_path: Path) -> None:
    # Full hours that somebody wrote down are no sign that nobody looked in between.
    found = read_trace(written(tmp_path, "hours,event,machine\n0,add,a\n10,remove,a\n"))
    assert found.resolution_s == 60.0
    assert found.spread(0).machines[0].end_s > 36000 - 60


def test_shares_of_notices_are_drawn() -> None:
    trace = Trace(tuple(Machine(n, n + 10) for n in range(1000)), 1000)
    without = [one.notice_s == 0 for one in trace.with_notices(2.0, 0.3, seed=4).machines]
    assert 0.25 < sum(without) / 1000 < 0.35


def test_exponential_lives_have_their_mean_and_are_drawn_again() -> None:
    def lives(seed: str) -> list[float]:
        capacity = ExponentialCapacity(100.0, 30.0, 0.5, seed)
        machines = [capacity.next_machine(7.0) for _ in range(4000)]
        assert all(0 <= machine.notice_s <= machine.end_s - 7.0 + 1e-9 for machine in machines)
        return [machine.end_s - machine.begin_s for machine in machines]

    assert sum(lives("1")) / 4000 == pytest.approx(100, rel=0.05)
    assert lives("1") == lives("1") != lives("2")
