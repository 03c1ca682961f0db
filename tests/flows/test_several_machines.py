"""One run on two machines, under a real Prefect server; each machine is a network of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.tasks.attempts import newest_step
from holdfast.training.runs.directory import RunDirectory, SegmentRecord, read_segments
from holdfast.training.storage.address import Address
from holdfast.training.tiers.viewing import ALL, refresh_view
from tests.contracts.object_servers import make_bucket, moto
from tests.flows.cluster import CHEAP_EXPORT, Cluster, train_whole
from tests.flows.prefect_server import wait_until
from tests.flows.recovery import PATIENCE_S, assert_same_bytes
from tests.network import Network, network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ADDRESS = Address("s3", "runs", "machines")
ENDPOINT = "AWS_ENDPOINT_URL"
OVERRIDES = (
    "train.num_epochs=150",
    "train.num_threads=1",
    "checkpoint.every_s=1",
    "logging.every_s=0.2",
    "distributed.strategy=ddp",
    "distributed.num_shards=4",
    *CHEAP_EXPORT,
)
ON_MACHINES = (
    *OVERRIDES,
    "distributed.num_processes=2",
    "distributed.max_machines=2",
    "distributed.machines_wait_s=5",
    "distributed.grow_after_s=3",
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same run in one process, with nothing that happens to it."""
    return train_whole(tmp_path_factory.mktemp("calm"), OVERRIDES)


@pytest.fixture
def switch(machines: Cluster) -> Iterator[Network]:
    with network() as built:
        built.let_in(machines.server.port)
        yield built
        machines.remove_machines()


class Stage:
    """Where the run is kept, and what its machines are told."""

    def __init__(self, machines: Cluster, switch: Network, store: str) -> None:
        self.machines, self.switch, self.store = machines, switch, store
        self.variables = {"PREFECT_API_URL": f"http://{switch.address}:{machines.server.port}/api"}

    def run(self, *also: str) -> RunDirectory:
        if self.store == str(ADDRESS):
            return RunDirectory(refresh_view(ADDRESS, "digits/two", also=also) / "digits/two")
        return RunDirectory(Path(self.store) / "digits" / "two")

    def newest(self) -> SegmentRecord | None:
        records = read_segments(self.run())
        return records[-1] if records else None

    def own(self, name: str) -> dict[str, str]:
        return {**self.variables, "HOLDFAST_SCRATCH": str(self.machines.folder / f"disk-{name}")}

    def start_guest(self, name: str):
        there = self.switch.plug_in()
        return self.machines.start_guest(
            name, "two", self.store, prefix=there.prefix, **self.own(name)
        )

    def wait_for_width(self, number: int, width: int) -> float:
        """Until a segment of so many machines has done a step; how long it took."""

        def has_stepped() -> bool:
            newest = self.newest()
            return (
                newest is not None
                and newest.number >= number
                and (newest.num_machines or 1) == width
                and newest.end_step > newest.start_step
            )

        what = f"a step of segment {number} on {width}"
        return wait_until(has_stepped, PATIENCE_S, what, self.machines.story)


@pytest.fixture(params=["folder", "bucket"])
def stage(
    request: pytest.FixtureRequest,
    machines: Cluster,
    switch: Network,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Stage]:
    if request.param == "folder":
        yield Stage(machines, switch, str(tmp_path / "store"))
        return
    pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
    pytest.importorskip("moto", reason="moto is not installed")
    with moto() as server:
        for name, value in server.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "watcher"))
        make_bucket(server, ADDRESS.bucket)
        found = Stage(machines, switch, str(ADDRESS))
        port = int(os.environ[ENDPOINT].rpartition(":")[2])
        found.variables |= {**server, ENDPOINT: f"http://{switch.let_in(port)}"}
        yield found


def test_one_of_two_machines_is_killed_and_another_comes(
    stage: Stage, machines: Cluster, calm: RunDirectory
) -> None:
    stage.start_guest("guest")
    first = stage.switch.plug_in()
    machines.start_machine("first", prefix=first.prefix, **stage.own("first"))
    flow_run = machines.create_flow_run("two", ON_MACHINES, store=stage.store)
    stage.wait_for_width(1, 2)
    machines.note("both machines train")
    wait_until(lambda: newest_step(stage.run()) >= 100, PATIENCE_S, "steps", machines.story)

    machines.note("guest: SIGKILL to everything")
    machines.machines["guest"].vanish()
    took_s = stage.wait_for_width(2, 1)
    machines.note(f"first: first new step, alone, {took_s:.1f} s after")

    start_s = time.monotonic()
    stage.start_guest("other")
    stage.wait_for_width(3, 2)
    took_s = time.monotonic() - start_s
    machines.note(f"first and other: first step together {took_s:.1f} s after it was started")

    assert machines.wait_for_state(flow_run, "Completed", "Failed", "Crashed") == "Completed"
    print(machines.timeline(flow_run))
    records = read_segments(stage.run(ALL))
    print([(r.num_machines, r.num_processes, r.start_step, r.end_step) for r in records])
    assert [record.num_machines for record in records] == [2, None, 2]
    assert_same_bytes(stage.run(ALL), calm)
    ended: Callable[[], bool] = machines.machines["other"].is_empty
    wait_until(ended, PATIENCE_S, "the other machine leaves", machines.story)
    assert machines.machines["other"].process.wait() == 0
