"""Attempts and the two budgets that are counted from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.tasks.attempts import (
    Attempt,
    AttemptLog,
    crashes_in_a_row,
    idle_preemptions_in_a_row,
    newest_step,
)
from holdfast.training.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def commit(run: RunDirectory, step: int) -> None:
    run.checkpoint(step).mkdir(parents=True)


def test_a_run_that_was_never_tried_has_no_attempts(run: RunDirectory) -> None:
    assert AttemptLog(run, "segment").read() == []
    assert newest_step(run) == 0


def test_an_attempt_knows_how_it_ended_and_how_far_checkpoints_moved(run: RunDirectory) -> None:
    log = AttemptLog(run, "segment")
    log.begin()
    commit(run, 40)
    log.end("preempted", 75)
    assert log.read() == [Attempt("preempted", 0, 40)]


def test_an_attempt_that_nobody_saw_the_end_of_is_lost(run: RunDirectory) -> None:
    log = AttemptLog(run, "segment")
    log.begin()
    commit(run, 10)
    log.begin()
    log.end("completed", 0)
    assert log.read() == [Attempt("lost", 0, 10), Attempt("completed", 10, 10)]


def test_stages_are_counted_apart(run: RunDirectory) -> None:
    AttemptLog(run, "export").begin()
    assert AttemptLog(run, "segment").read() == []


def test_a_new_flow_run_has_budgets_of_its_own(run: RunDirectory) -> None:
    first = AttemptLog(run, "segment", "first")
    first.begin()
    first.end("failed", 1)
    assert AttemptLog(run, "segment", "second").read() == []
    assert len(AttemptLog(run, "segment", "first").read()) == 1


def test_a_line_that_was_cut_off_hides_no_other(run: RunDirectory) -> None:
    log = AttemptLog(run, "segment")
    log.begin()
    with (run.logs / "attempts.jsonl").open("a") as file:
        file.write('{"event": "end", "sta')
    log.begin()
    log.end("failed", 1)
    assert [attempt.ending for attempt in log.read()] == ["lost", "failed"]


def test_crashes_count_until_there_is_progress_whatever_lies_between_them() -> None:
    idle = Attempt("failed", 5, 5)
    assert crashes_in_a_row([idle, Attempt("preempted", 5, 5), idle]) == 2
    assert crashes_in_a_row([idle, Attempt("preempted", 5, 9), idle]) == 1
    assert crashes_in_a_row([idle, Attempt("failed", 5, 9), idle]) == 2


def test_preemptions_are_free_as_long_as_there_is_progress() -> None:
    moving = [Attempt("preempted", step, step + 1) for step in range(100)]
    assert idle_preemptions_in_a_row(moving) == 0
    idle = [Attempt("lost", 100, 100), Attempt("preempted", 100, 100)]
    assert idle_preemptions_in_a_row(moving + idle) == 2
