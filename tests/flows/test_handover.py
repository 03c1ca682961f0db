"""Who may hand a flow run over, and how worker and engine find each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import AwaitingRetry, Cancelling, Running

from holdfast.flows.fleet.rescue import run_of
from holdfast.flows.fleet.worker_link import engine_environment, tell_worker_to_drain
from holdfast.flows.pipeline.handover import FlowRunAttempt, is_ours_to_hand_over, is_running_as
from holdfast.tasks.completion import MachineLeavingError


def flow_run(**values: object) -> FlowRun:
    return FlowRun.model_validate({"id": uuid4(), "flow_id": uuid4(), **values})


def test_a_flow_run_is_ours_while_it_runs_in_our_attempt() -> None:
    found = flow_run(state=Running(), run_count=2)
    assert is_running_as(FlowRunAttempt(found.id, 2), found)
    assert not is_running_as(FlowRunAttempt(found.id, 1), found), "another worker has it"


@pytest.mark.parametrize("state", [Cancelling(), AwaitingRetry()])
def test_a_flow_run_that_was_cancelled_or_rescheduled_is_not_ours(state: object) -> None:
    found = flow_run(state=state, run_count=1)
    assert not is_running_as(FlowRunAttempt(found.id, 1), found)


@pytest.mark.parametrize("behaviour", ["reschedule", "RELINQUISH"])
def test_prefect_is_left_to_do_what_it_was_told_to(
    behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", raising=False)
    assert is_ours_to_hand_over()
    monkeypatch.setenv("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", behaviour)
    assert not is_ours_to_hand_over()


def test_an_engine_gets_less_time_than_its_worker_has() -> None:
    assert engine_environment(28.0)["HOLDFAST_GRACE_PERIOD_S"] == "24"
    assert engine_environment(28.0)["HOLDFAST_WORKER_PID"] == str(os.getpid())


def test_only_the_worker_that_is_the_parent_is_told_to_drain() -> None:
    script = (
        "from holdfast.flows.fleet.worker_link import tell_worker_to_drain; tell_worker_to_drain()"
    )
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: received.append(number))
    try:
        for pid in (os.getpid(), os.getppid()):
            environment = {**os.environ, "HOLDFAST_WORKER_PID": str(pid)}
            subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]


def test_without_a_worker_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOLDFAST_WORKER_PID", raising=False)
    tell_worker_to_drain()


def test_a_wall_time_budget_does_not_empty_the_machine() -> None:
    assert MachineLeavingError("aws", "terminate").is_for_good
    assert not MachineLeavingError("wall_time", "over").is_for_good


def test_the_run_directory_follows_from_the_parameters_of_a_flow_run() -> None:
    told = {"experiment": "digits", "store": "/store", "run_id": "{flow_run}"}
    found = flow_run(parameters=told)
    run = run_of(found)
    assert run is not None
    assert str(run.path) == f"/store/digits/{str(found.id)[:8]}"


@pytest.mark.parametrize(
    "told", [{}, {"experiment": "digits", "store": "./runs", "run_id": "a"}, {"experiment": 3}]
)
def test_a_run_directory_that_cannot_be_known_is_none(told: dict[str, object]) -> None:
    assert run_of(flow_run(parameters=told)) is None
