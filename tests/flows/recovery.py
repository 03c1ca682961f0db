"""What tests of runs that come back have in common: begin, wait, compare."""

from __future__ import annotations

import json
from collections import Counter
from uuid import UUID

import psutil

from holdfast.tasks.attempts import newest_step
from holdfast.training.runs.directory import RunDirectory, read_segments
from tests.flows.cluster import Cluster, Machine
from tests.flows.conftest import OVERRIDES
from tests.flows.prefect_server import wait_until

GRACE_PERIOD_S = 30.0
# Where the machine does other things as well, everything takes a multiple of its time.
PATIENCE_S = 240.0
EXACT_FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")


def hand_over_at_a_notice(machines: Cluster, uninterrupted: RunDirectory) -> None:
    """A worker's machine gets a notice; another worker takes the same flow run up."""
    first = machines.start_machine("first")
    run, flow_run = start_run(machines, "notice")
    train_some_steps(machines, run)
    machines.start_machine("second")

    first.notice()
    machines.note("first: SIGTERM to its group")
    took_s = wait_until(first.is_empty, GRACE_PERIOD_S, "the machine is empty")
    machines.note(f"first: empty after {took_s:.1f} s, the grace period is {GRACE_PERIOD_S:g} s")
    saved = newest_step(run)
    assert first.process.wait() == 0

    assert machines.wait_for_state(flow_run, "Completed", "Failed", "Crashed") == "Completed"
    print(machines.timeline(flow_run))
    before, after = read_segments(run)
    assert (before.outcome, after.outcome) == ("preempted", "completed")
    assert before.end_step == after.start_step == saved, "not a step was lost"
    assert state_names(machines, flow_run)["AwaitingRetry"] == 1
    assert_same_bytes(run, uninterrupted)


def start_run(
    machines: Cluster, run_id: str, overrides: tuple[str, ...] = OVERRIDES
) -> tuple[RunDirectory, UUID]:
    """Ask for the run; where it will be."""
    flow_run = machines.create_flow_run(run_id, overrides)
    return RunDirectory(machines.store / "digits" / run_id), flow_run


def train_some_steps(machines: Cluster, run: RunDirectory, num_steps: int = 100) -> None:
    """Wait until checkpoints have moved on by so many steps."""
    step = newest_step(run)
    wait_until(lambda: newest_step(run) >= step + num_steps, PATIENCE_S, "steps", machines.story)


def child(machine: Machine) -> psutil.Process:
    """The process that trains on this machine."""
    (found,) = machine.children()
    return found


def state_names(machines: Cluster, flow_run: UUID) -> Counter[str]:
    return Counter(state.name for state in machines.history(flow_run))


def final_bytes(run: RunDirectory) -> dict[str, bytes]:
    folder = run.checkpoint(newest_step(run))
    return {name: (folder / name).read_bytes() for name in EXACT_FILES}


def assert_same_bytes(run: RunDirectory, uninterrupted: RunDirectory) -> None:
    """Of the final checkpoint and of the champion; and the pipeline came to its end."""
    ours, theirs = final_bytes(run), final_bytes(uninterrupted)
    assert (
        json.loads(ours["state.json"])["counters"] == json.loads(theirs["state.json"])["counters"]
    )
    assert [name for name in EXACT_FILES if ours[name] != theirs[name]] == []
    assert champion(run) == champion(uninterrupted)
    assert run.bundle.is_dir()
    assert run.report_html.is_file()


def champion(run: RunDirectory) -> tuple[str, str]:
    """Name and digest of the weights that won."""
    found = json.loads(run.evaluation_json.read_text())["champion"]
    return found["name"], found["digest"]
