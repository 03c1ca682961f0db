"""Ten flow runs whose stores are poisoned, beside ten good ones that have lost their machines."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from holdfast.tasks.engine_lease import engine_directory, engine_lease
from holdfast.training.runs.directory import RunDirectory
from tests.flows.cluster import Cluster
from tests.flows.prefect_server import wait_until
from tests.safety.hostile import put_special
from tests.training.checkpointing.checkpoints import in_child

NUM_GOOD = 10
# The engine's lease runs out in 20 s, the pause is 5 s, and a look is made every 2 s.
USUAL_S = 60.0
Poison = Callable[[RunDirectory], None]


def lose_engine(run: RunDirectory, flow_run: UUID) -> None:
    """An engine has driven the run, and its machine is gone."""

    def act() -> None:
        with engine_lease(run, str(flow_run), 1, wait_s=0.0):
            os._exit(0)

    assert in_child(act) == 0


def special(name: str, kind: str) -> Poison:
    return lambda run: put_special(run.path / name, kind, run.path / "elsewhere")


def text(name: str, content: bytes) -> Poison:
    return lambda run: (run.path / name).write_bytes(content) and None


def far_generation(run: RunDirectory) -> None:
    (engine_directory(run).lease / f"{'9' * 240}.json").write_bytes(b"{}")


def loop_for_run(run: RunDirectory) -> None:
    run.path.rename(run.path.with_name(f"{run.path.name}-elsewhere"))
    run.path.symlink_to(run.path)


LEASE = ".engine/lease/00000001.json"
POISONS: dict[str, Poison] = {
    "pid": text(LEASE, b'{"pid": 1e999}'),
    "sparse": special(LEASE, "sparse"),
    "endless": special(LEASE, "zero"),
    "fifo": special(".engine/holder.json", "fifo"),
    "deep": text(".engine/holder.json", b"[" * 10**6),
    "digits": text(".engine/holder.json", b'{"generation": ' + b"9" * 5000 + b"}"),
    "generation": far_generation,
    "loop": loop_for_run,
}
STORES: dict[str, Callable[[Path], str]] = {
    "long": lambda folder: str(folder / ("x" * 300)),
    "file": lambda folder: str(folder / "store-file" / "below"),
    "null": lambda folder: f"{folder}/x\0y",
}


def start(machines: Cluster, name: str, **parameters: Any) -> UUID:
    """A flow run that Prefect believes to be running."""
    from prefect.states import Pending, Running

    flow_run = machines.create_flow_run(name, (), **parameters)
    with machines.client() as client:
        for state in (Pending(), Running()):
            client.set_flow_run_state(flow_run, state, force=True)
    return flow_run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_poisoned_runs_keep_no_good_one_waiting(machines: Cluster) -> None:
    (machines.folder / "store-file").write_bytes(b"")
    for name, poison in POISONS.items():
        flow_run = start(machines, f"poisoned-{name}")
        run = RunDirectory(machines.store / "digits" / f"poisoned-{name}")
        lose_engine(run, flow_run)
        poison(run)
    for name, store in STORES.items():
        start(machines, f"poisoned-{name}", store=store(machines.folder))
    assert len(POISONS) + len(STORES) >= 10
    good = {}
    for number in range(NUM_GOOD):
        run = RunDirectory(machines.store / "digits" / f"good-{number}")
        good[number] = start(machines, f"good-{number}")
        lose_engine(run, good[number])
    rescuer = machines.start_rescuer()
    threads = threading.active_count()

    def are_rescued() -> bool:
        names = Counter(machines.state(flow_run) for flow_run in good.values())
        return names["AwaitingRetry"] == NUM_GOOD

    took_s = wait_until(are_rescued, USUAL_S, "all good ones", machines.story, every_s=1)
    print(f"{NUM_GOOD} good runs beside {len(POISONS) + len(STORES)} poisoned: {took_s:.0f} s")
    told = rescuer.log()
    assert rescuer.process.poll() is None
    assert "Traceback" not in told
    assert "nothing is marked" not in told
    assert threading.active_count() <= threads
