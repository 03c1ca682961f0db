"""A run comes back by itself: real server, real workers, real signals, equal bytes.

Each test prints what happened when: states of the flow run, and (with a star) what was done.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from holdfast.tasks.attempts import newest_step
from holdfast.training.runs.directory import RunDirectory, read_segments
from tests.flows.cluster import Cluster
from tests.flows.conftest import LONGER_OVERRIDES, OVERRIDES
from tests.flows.prefect_server import wait_until
from tests.flows.recovery import (
    GRACE_PERIOD_S,
    PATIENCE_S,
    assert_same_bytes,
    child,
    hand_over_at_a_notice,
    start_run,
    state_names,
    train_some_steps,
)

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.slow
def test_a_child_that_is_stopped_or_killed_goes_on_here(
    machines: Cluster, uninterrupted: RunDirectory
) -> None:
    machine = machines.start_machine("one")
    run, flow_run = start_run(machines, "child")

    train_some_steps(machines, run)
    child(machine).send_signal(signal.SIGTERM)
    machines.note("one: SIGTERM to the training child")
    train_some_steps(machines, run)
    child(machine).kill()
    machines.note("one: SIGKILL to the training child")

    assert machines.wait_for_state(flow_run, "Completed", "Failed", "Crashed") == "Completed"
    print(machines.timeline(flow_run))
    assert state_names(machines, flow_run)["Running"] == 1
    assert [s.outcome for s in read_segments(run)] == ["preempted", "running", "completed"]
    assert_same_bytes(run, uninterrupted)


@pytest.mark.slow
def test_a_spot_notice_hands_the_run_to_another_worker(
    machines: Cluster, uninterrupted: RunDirectory
) -> None:
    hand_over_at_a_notice(machines, uninterrupted)


@pytest.mark.slow
def test_a_machine_that_vanishes_is_missed_and_replaced(
    machines: Cluster, uninterrupted: RunDirectory
) -> None:
    machines.start_rescuer()
    first = machines.start_machine("first")
    run, flow_run = start_run(machines, "vanished")
    train_some_steps(machines, run)
    machines.start_machine("second")

    first.vanish()
    machines.note("first: SIGKILL to everything")
    vanished_s = time.monotonic()
    lost_from = newest_step(run)
    wait_until(lambda: len(read_segments(run)) > 1, PATIENCE_S, "a second segment", machines.story)
    machines.note(f"second: trains {time.monotonic() - vanished_s:.1f} s after")

    assert machines.wait_for_state(flow_run, "Completed", "Failed") == "Completed"
    print(machines.timeline(flow_run))
    lost, after = read_segments(run)
    assert (lost.outcome, after.outcome) == ("running", "completed")
    assert after.start_step == lost_from
    assert_same_bytes(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_of_the_server_does_not_disturb_training(
    machines: Cluster, uninterrupted_longer: RunDirectory, number: signal.Signals
) -> None:
    machines.start_rescuer()
    machines.start_machine("one")
    machines.start_machine("two")
    run, flow_run = start_run(machines, f"server-{number.name}", LONGER_OVERRIDES)
    train_some_steps(machines, run)

    machines.server.stop(number)
    machines.note(f"server: {number.name}")
    step = newest_step(run)
    wait_until(lambda: newest_step(run) > step, PATIENCE_S, "training goes on without a server")
    time.sleep(5)
    machines.server.start()
    machines.note("server: started again")
    assert read_segments(run)[0].outcome == "running", "the middle of training"

    assert machines.wait_for_state(flow_run, "Completed", "Failed", "Crashed") == "Completed"
    print(machines.timeline(flow_run))
    assert state_names(machines, flow_run)["Running"] == 1
    assert [s.outcome for s in read_segments(run)] == ["completed"], "nothing was trained twice"
    assert_same_bytes(run, uninterrupted_longer)


@pytest.mark.slow
def test_a_notice_without_a_signal_empties_the_machine_and_hands_over(
    machines: Cluster, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    sentinel = tmp_path / "leaving"
    sources = 'preemption.sources=["signal", "sentinel"]'
    # As in a pod, where Prefect sees to SIGTERM, but the preStop hook's file comes before it.
    variables = {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule"}
    first = machines.start_machine("first", **variables)
    run, flow_run = start_run(
        machines, "sentinel", (*OVERRIDES, sources, f"preemption.sentinel_file={sentinel}")
    )
    train_some_steps(machines, run)

    sentinel.touch()
    machines.note("first: the sentinel file appears")
    wait_until(first.is_empty, GRACE_PERIOD_S, "the machine is empty", first.log)
    machines.note("first: its worker has left as well")
    sentinel.unlink()
    machines.start_machine("second")

    assert machines.wait_for_state(flow_run, "Completed", "Failed", "Crashed") == "Completed"
    print(machines.timeline(flow_run))
    assert [s.outcome for s in read_segments(run)] == ["preempted", "completed"]
    assert_same_bytes(run, uninterrupted)


@pytest.mark.slow
def test_an_engine_that_is_killed_leaves_no_orphan_and_is_started_again(
    machines: Cluster, uninterrupted: RunDirectory
) -> None:
    machines.start_rescuer()
    machine = machines.start_machine("one")
    run, flow_run = start_run(machines, "engine")
    train_some_steps(machines, run)

    orphan = child(machine)
    (engine,) = machine.engines()
    engine.kill()
    machines.note("one: SIGKILL to the engine")
    wait_until(lambda: not orphan.is_running(), GRACE_PERIOD_S, "the child saved and left")
    saved = newest_step(run)

    assert machines.wait_for_state(flow_run, "Completed", "Failed") == "Completed"
    print(machines.timeline(flow_run))
    before, after = read_segments(run)
    assert (before.outcome, after.outcome) == ("preempted", "completed")
    assert after.start_step == saved, "the kernel told the child, which saved"
    assert_same_bytes(run, uninterrupted)


@pytest.mark.slow
def test_without_a_lease_in_sight_a_loss_is_missed_by_its_heartbeat(machines: Cluster) -> None:
    machines.start_rescuer()
    first = machines.start_machine("first")
    entrypoint = "tests.flows.out_of_sight.store_out_of_sight"
    flow_run = machines.create_flow_run("unseen", (), entrypoint)
    machines.wait_for_state(flow_run, "Running")
    time.sleep(5)
    machines.start_machine("second")

    first.vanish()
    machines.note("first: SIGKILL to everything")
    assert machines.wait_for_state(flow_run, "Completed", "Failed") == "Completed"
    print(machines.timeline(flow_run))
    crashed = next(s for s in machines.history(flow_run) if s.name == "Crashed")
    assert "no heartbeat" in crashed.message


@pytest.mark.slow
def test_a_worker_that_was_presumed_dead_wakes_up_and_changes_nothing(
    machines: Cluster, uninterrupted: RunDirectory
) -> None:
    machines.start_rescuer()
    sleeper = machines.start_machine("sleeper")
    run, flow_run = start_run(machines, "sleeper")
    train_some_steps(machines, run)
    machines.start_machine("second")

    sleeper.freeze()
    machines.note("sleeper: SIGSTOP to everything")
    frozen = read_segments(run)[0]
    wait_until(lambda: len(read_segments(run)) > 1, PATIENCE_S, "a second segment", machines.story)
    train_some_steps(machines, run)
    sleeper.wake()
    machines.note("sleeper: SIGCONT to everything")
    wait_until(lambda: not sleeper.children(), PATIENCE_S, "the sleeper's child has ended")
    wait_until(lambda: not sleeper.engines(), PATIENCE_S, "the sleeper's engine has ended")
    machines.note("sleeper: its child and engine have ended")

    assert machines.wait_for_state(flow_run, "Completed", "Failed") == "Completed"
    print(machines.timeline(flow_run))
    asleep, after = read_segments(run)
    assert asleep == frozen, "it changed nothing, not even its own record"
    assert after.outcome == "completed"
    assert (
        state_names(machines, flow_run)["Running"] + state_names(machines, flow_run)["Retrying"]
        == 2
    )
    assert_same_bytes(run, uninterrupted)
