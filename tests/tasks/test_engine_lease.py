"""The engine's lease: one engine drives a run, and says which flow run it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.tasks.engine_lease import (
    engine_directory,
    engine_lease,
    read_engine,
    require_engine_is_here,
)
from holdfast.training.errors import InputError, LeaseHeldError, LeaseLostError
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.process_identity import ProcessIdentity

ELSEWHERE = ProcessIdentity("elsewhere", "another boot", "1", 4711, 1)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "digits" / "run")
    made.path.mkdir(parents=True)
    made.run_json.write_text("{}")
    return made


def test_the_engine_tells_which_attempt_it_is(run: RunDirectory) -> None:
    with engine_lease(run, "a-flow-run", 3, wait_s=0):
        found = read_engine(run)
        assert found is not None
        assert found[0].status == "held"
        assert (found[1].flow_run_id, found[1].run_count) == ("a-flow-run", 3)
    released = read_engine(run)
    assert released is not None
    assert released[0].status == "released"


def test_a_second_engine_is_refused(run: RunDirectory) -> None:
    with (
        engine_lease(run, "one", 1, wait_s=0),
        pytest.raises(LeaseHeldError),
        engine_lease(run, "two", 1, wait_s=0),
    ):
        pass


def test_an_engine_that_was_replaced_learns_of_it(run: RunDirectory) -> None:
    require_engine_is_here(run)
    with engine_lease(run, "one", 1, wait_s=0):
        require_engine_is_here(run)
    with Lease.acquire(engine_directory(run), 20.0, identity=ELSEWHERE):
        with pytest.raises(LeaseLostError, match="4711 on elsewhere"):
            require_engine_is_here(run)
        assert read_engine(run) is None, "its holder has not told yet what it works on"


def test_a_run_that_was_never_begun_leaves_nothing_behind(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits" / "refused")
    with engine_lease(run, "", 0, wait_s=0):
        assert run.path.exists()
    assert not run.path.exists()


def test_a_run_that_was_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits" / "refused")
    with pytest.raises(InputError), engine_lease(run, "", 0, wait_s=0):
        raise InputError("optimizer.name")
    assert not run.path.exists()


def test_an_engine_that_was_replaced_removes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits" / "replaced")
    with pytest.raises(LeaseLostError), engine_lease(run, "", 0, wait_s=0):
        raise LeaseLostError("driven by another")
    assert engine_directory(run).path.exists()
