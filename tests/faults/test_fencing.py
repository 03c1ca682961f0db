"""Five processes that want to write one run, and fall asleep for twice the lease's time.

They sleep between looking and writing, and are stopped by SIGSTOP wherever they are.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.storage.address import parse_address
from holdfast.training.storage.opening import open_store
from holdfast.training.tiers.head import read_head
from tests.contracts.object_servers import (
    azurite,
    google,
    make_bucket,
    make_container,
    moto,
    seaweedfs,
)
from tests.contracts.test_object_stores import require_program
from tests.faults.fencing import NAME, TTL_S, step_of

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
pytest.importorskip("moto", reason="moto is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NUM_PROCESSES, FOR_S, NUM_ROUNDS = 5, 8.0, 3
ROOT = Path(__file__).parents[2]
PROGRAMS = {"seaweedfs": "weed", "azurite": "azurite-blob"}
SCHEMES = {"google": "gs", "azurite": "az"}


def server(name: str, folder: Path) -> AbstractContextManager[dict[str, str]]:
    if name in PROGRAMS:
        require_program(PROGRAMS[name])
    servers = {"moto": moto, "google": google, "azurite": azurite}
    return seaweedfs(folder) if name == "seaweedfs" else servers[name]()


def contend(address: str, seed: int) -> list[tuple[str, ...]]:
    """One round; what each of the processes printed."""
    rng, running = random.Random(seed), []
    for number in range(NUM_PROCESSES):
        words = ("tests.faults.fencing", address, str(10 * seed + number), str(FOR_S))
        running.append(
            subprocess.Popen(
                python_command(*words),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    end_s = time.monotonic() + FOR_S
    while time.monotonic() < end_s:
        stopped = rng.choice(running)
        if stopped.poll() is None:
            stopped.send_signal(signal.SIGSTOP)
            time.sleep(2 * TTL_S)
            stopped.send_signal(signal.SIGCONT)
        time.sleep(0.2)
    told = []
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        told.append(tuple(output.splitlines()))
    return told


@pytest.mark.parametrize("name", ["moto", "google", "seaweedfs", "azurite"])
def test_no_step_is_committed_by_two_that_fall_asleep_between_looking_and_writing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = SCHEMES.get(name, "s3")
    with server(name, tmp_path) as environment:
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        if scheme == "s3":
            make_bucket(environment, "runs")
        elif scheme == "az":
            make_container(environment, "runs")
        for seed in range(NUM_ROUNDS):
            address = f"{scheme}://runs/round-{seed}"
            lines = [line for told in contend(address, seed) for line in told]
            steps = sorted(int(line.split()[0]) for line in lines if line != "lost")
            print(f"{name}, round {seed}: {len(steps)} commits, {lines.count('lost')} leases lost")
            assert steps == list(range(1, len(steps) + 1)), "a step was committed twice, or lost"
            assert len(steps) >= 5
            assert "lost" in lines
            found = read_head(open_store(parse_address(address)), NAME)
            assert found is not None
            assert step_of(found[0].tree) == len(steps)
