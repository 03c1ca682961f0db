"""Two machines that have no folder in common, only a bucket, under a real Prefect server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from holdfast.tasks.attempts import newest_step
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.storage.address import Address
from holdfast.training.tiers.viewing import ALL, refresh_view
from tests.contracts.fault_proxy import FaultProxy, hurt_bucket
from tests.contracts.object_servers import moto
from tests.flows.cluster import Cluster, Machine
from tests.flows.conftest import LONGER_OVERRIDES, OVERRIDES
from tests.flows.prefect_server import wait_until
from tests.flows.recovery import PATIENCE_S, assert_same_bytes

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
pytest.importorskip("moto", reason="moto is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ADDRESS = Address("s3", "runs", "fleet")
OUTAGE_S = 60.0
ELSEWHERE_S = 60.0


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with moto() as server, hurt_bucket(server, ADDRESS.bucket, monkeypatch) as proxy:
        monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "watcher"))
        yield proxy


@pytest.fixture
def bucket(tmp_path: Path, way: FaultProxy) -> Path:
    """A folder for the machines' scratch disks, while there is a bucket."""
    return tmp_path


def seen(run_id: str, also: tuple[str, ...] = ()) -> RunDirectory:
    name = f"digits/{run_id}"
    return RunDirectory(refresh_view(ADDRESS, name, also=also) / name)


def wait_for_steps(machines: Cluster, run_id: str, num_steps: int) -> None:
    wait_until(lambda: newest_step(seen(run_id)) >= num_steps, PATIENCE_S, "steps", machines.story)


def start(machines: Cluster, name: str, folder: Path) -> Machine:
    """A machine with a scratch disk of its own."""
    return machines.start_machine(name, HOLDFAST_SCRATCH=str(folder / name))


def test_machines_that_vanish_are_replaced_by_ones_that_share_nothing_with_them(
    machines: Cluster, uninterrupted: RunDirectory, bucket: Path
) -> None:
    machines.start_rescuer()
    training = start(machines, "first", bucket)
    flow_run = machines.create_flow_run("vanished", OVERRIDES, store=str(ADDRESS))
    for number, name in enumerate(("second", "third"), 1):
        wait_for_steps(machines, "vanished", 100 * number)
        replacement = start(machines, name, bucket)
        training.vanish()
        machines.note(f"{training.name}: SIGKILL to everything")
        vanished_s = time.time()
        wait_until(
            lambda number=number: len(read_segments(seen("vanished"))) > number,
            PATIENCE_S,
            "the next segment",
            machines.story,
        )
        began = datetime.fromisoformat(read_segments(seen("vanished"))[number].started_at)
        took_s = began.timestamp() - vanished_s
        machines.note(f"{name}: its segment began {took_s:.1f} s after")
        assert took_s <= ELSEWHERE_S
        assert "watching for" not in replacement.log(), "the rescuer has watched the dead one"
        training = replacement
    assert machines.wait_for_state(flow_run, "Completed", "Failed") == "Completed"
    print(machines.timeline(flow_run))
    run = seen("vanished", (ALL,))
    assert [s.outcome for s in read_segments(run)] == ["running", "running", "completed"]
    assert_same_bytes(run, uninterrupted)


def test_an_outage_of_a_minute_disturbs_nothing(
    machines: Cluster, uninterrupted_longer: RunDirectory, bucket: Path, way: FaultProxy
) -> None:
    """Nobody is taken for dead: neither while the server is away, nor when it is back."""
    machines.start_rescuer()
    start(machines, "first", bucket)
    start(machines, "second", bucket)
    flow_run = machines.create_flow_run("outage", LONGER_OVERRIDES, store=str(ADDRESS))
    wait_for_steps(machines, "outage", 100)
    way.hurt(for_ever="reset")
    machines.note("the server is away")
    time.sleep(OUTAGE_S)
    way.hurt()
    machines.note("the server is back")
    assert machines.wait_for_state(flow_run, "Completed", "Failed", "Crashed") == "Completed"
    print(machines.timeline(flow_run))
    names = [state.name for state in machines.history(flow_run)]
    assert not {"Crashed", "AwaitingRetry"} & {*names}
    run = seen("outage", (ALL,))
    assert [s.outcome for s in read_segments(run)] == ["completed"]
    assert_same_bytes(run, uninterrupted_longer)


def test_a_notice_hands_a_run_over_through_the_bucket_and_no_step_is_lost(
    machines: Cluster, uninterrupted: RunDirectory, bucket: Path
) -> None:
    first = start(machines, "first", bucket)
    flow_run = machines.create_flow_run("notice", OVERRIDES, store=str(ADDRESS))
    wait_for_steps(machines, "notice", 100)
    start(machines, "second", bucket)
    first.notice()
    machines.note("first: SIGTERM to its group")
    assert machines.wait_for_state(flow_run, "Completed", "Failed", "Crashed") == "Completed"
    print(machines.timeline(flow_run))
    run = seen("notice", (ALL,))
    before, after = read_segments(run)
    assert (before.outcome, after.outcome) == ("preempted", "completed")
    assert before.end_step == after.start_step
    assert_same_bytes(run, uninterrupted)
