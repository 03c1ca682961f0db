"""Two machines that have no folder in common, only a bucket, under a real Prefect server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.tasks.attempts import newest_step
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.storage.address import Address
from holdfast.training.tiers.viewing import ALL, refresh_view
from tests.contracts.object_servers import make_bucket, moto
from tests.flows.cluster import Cluster
from tests.flows.conftest import OVERRIDES
from tests.flows.prefect_server import wait_until
from tests.flows.recovery import PATIENCE_S, assert_same_bytes

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
pytest.importorskip("moto", reason="moto is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ADDRESS = Address("s3", "runs", "fleet")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with moto() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "watcher"))
        make_bucket(environment, ADDRESS.bucket)
        yield tmp_path


def seen(run_id: str, also: tuple[str, ...] = ()) -> RunDirectory:
    name = f"digits/{run_id}"
    return RunDirectory(refresh_view(ADDRESS, name, also=also) / name)


def wait_for_steps(machines: Cluster, run_id: str, num_steps: int) -> None:
    wait_until(lambda: newest_step(seen(run_id)) >= num_steps, PATIENCE_S, "steps", machines.story)


def test_a_machine_that_vanishes_is_replaced_by_one_that_shares_nothing_with_it(
    machines: Cluster, uninterrupted: RunDirectory, bucket: Path
) -> None:
    machines.start_rescuer()
    first = machines.start_machine("first", HOLDFAST_SCRATCH=str(bucket / "first"))
    flow_run = machines.create_flow_run("vanished", OVERRIDES, store=str(ADDRESS))
    wait_for_steps(machines, "vanished", 100)
    machines.start_machine("second", HOLDFAST_SCRATCH=str(bucket / "second"))

    first.vanish()
    machines.note("first: SIGKILL to everything")
    vanished_s = time.monotonic()
    wait_until(
        lambda: len(read_segments(seen("vanished"))) > 1,
        PATIENCE_S,
        "a second segment",
        machines.story,
    )
    machines.note(f"second: trains {time.monotonic() - vanished_s:.1f} s after")
    assert machines.wait_for_state(flow_run, "Completed", "Failed") == "Completed"
    print(machines.timeline(flow_run))
    run = seen("vanished", (ALL,))
    assert [s.outcome for s in read_segments(run)] == ["running", "completed"]
    assert_same_bytes(run, uninterrupted)


def test_a_notice_hands_a_run_over_through_the_bucket_and_no_step_is_lost(
    machines: Cluster, uninterrupted: RunDirectory, bucket: Path
) -> None:
    first = machines.start_machine("first", HOLDFAST_SCRATCH=str(bucket / "first"))
    flow_run = machines.create_flow_run("notice", OVERRIDES, store=str(ADDRESS))
    wait_for_steps(machines, "notice", 100)
    machines.start_machine("second", HOLDFAST_SCRATCH=str(bucket / "second"))
    first.notice()
    machines.note("first: SIGTERM to its group")
    assert machines.wait_for_state(flow_run, "Completed", "Failed", "Crashed") == "Completed"
    print(machines.timeline(flow_run))
    run = seen("notice", (ALL,))
    before, after = read_segments(run)
    assert (before.outcome, after.outcome) == ("preempted", "completed")
    assert before.end_step == after.start_step
    assert_same_bytes(run, uninterrupted)
