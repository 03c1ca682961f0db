"""Many flow runs at once on several workers of one server."""

from __future__ import annotations

from collections import Counter

import pytest

from holdfast.training.runs.directory import RunDirectory, read_segments
from tests.flows.cluster import CHEAP_EXPORT, Cluster
from tests.flows.prefect_server import wait_until

NUM_RUNS = 20
NUM_WORKERS = 4
# One thread each: many processes with a thread per core wait for each other most of the time.
OVERRIDES = ("train.num_epochs=20", "train.num_threads=1", *CHEAP_EXPORT)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_flow_runs_on_four_workers_all_complete_and_none_twice(machines: Cluster) -> None:
    # All wait before the first worker comes: it is not this test that the server's SQLite refuses.
    flow_runs = {
        f"many-{number}": machines.create_flow_run(f"many-{number}", OVERRIDES)
        for number in range(NUM_RUNS)
    }
    machines.start_rescuer()
    for number in range(NUM_WORKERS):
        machines.start_machine(f"worker-{number}", "--limit", "2")

    ended: Counter[str] = Counter()

    def are_all_over() -> bool:
        nonlocal ended
        ended = Counter(machines.state(flow_run) for flow_run in flow_runs.values())
        return ended["Completed"] + ended["Failed"] == NUM_RUNS

    took_s = wait_until(are_all_over, 2900, "all have ended", machines.story, every_s=2)
    print(f"{NUM_RUNS} runs on {NUM_WORKERS} workers took {took_s:.0f} s: {dict(ended)}")
    assert ended == {"Completed": NUM_RUNS}
    for name, flow_run in flow_runs.items():
        states = Counter(state.name for state in machines.history(flow_run))
        # SQLite may refuse a worker's call ("database is locked") and leave a run pending, which
        # the rescuer then has started again; what has begun to run is never started twice.
        assert states["Running"] == 1
        if states["Crashed"]:
            print(f"{name} was rescued: {machines.timeline(flow_run)}")
        segments = read_segments(RunDirectory(machines.store / "digits" / name))
        assert [segment.outcome for segment in segments] == ["completed"]
        assert (machines.store / "digits" / name / "bundle").is_dir()
