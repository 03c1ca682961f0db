"""``make chaos-store KILLS=200``: kill who keeps a bucket up to date, at each point of its commits.

A life is a machine: a training on a scratch disk of its own, and beside it the process that keeps
the bucket. When that one is killed, the training is, too, and its disk is never seen again. On the
way to the server, moto, one request in ten goes wrong, before or after it has had its effect. At
the end a machine that has nothing of the run finds the bytes of a training that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.runs.faultpoints import POINT_VARIABLE, STORE_POINTS
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.probe import require_fit
from holdfast.training.tiers.companion import COMMAND
from holdfast.training.tiers.keeping import opened_replica
from holdfast.training.tiers.scratch import run_name, tier_folder
from tests.contracts.fault_proxy import Fault, FaultProxy, hurt_bucket
from tests.contracts.object_servers import KEY, SECRET, moto
from tests.faults.campaign import (
    Segment,
    Training,
    check_latest_is_good,
    complete,
    differences,
    final_state,
)
from tests.generality.harness import OFTEN

ADDRESS = Address("s3", "runs", "chaos")
NO_POINT = "store.after-delete:999"
LIFE_S = 120.0
MOST_LIVES = 40
OFTEN_REACHED = {"store.before-file": 12, "store.before-delete": 1, "store.after-delete": 1}
OFTEN_REACHED |= {"store.before-late-file": 4, "store.after-late-file": 4}
"""In one life, where that is not twice."""
ROOT = Path(__file__).parents[2]
FAULTS: tuple[Fault, ...] = (
    *("500", "503", "429", "reset", "503 after", "reset after"),
    *("cut body", "flipped bit", "NoSuchKey", "ExpiredToken"),
)
NUM_FAULTS = 5000
"""So many requests are planned for a life; later ones pass."""
End = Literal["killed", "refused", "whole"]


def planned(rng: random.Random, share: float) -> list[Fault]:
    """What becomes of the requests of a life."""
    return [rng.choice(FAULTS) if rng.random() < share else "none" for _ in range(NUM_FAULTS)]


def live(training: Training, point: str) -> End:
    """One life, which ends at the fault point or with the run.

    It is refused where the way to the server is too bad for a beginning.
    """
    command = python_command(
        "holdfast.training", COMMAND, "--store", str(ADDRESS), "--name", run_name(training.run)
    )
    keeper = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, POINT_VARIABLE: point},
        start_new_session=True,
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    told = json.loads(keeper.stdout.readline() or '{"error": "killed"}')
    if "error" in told:
        keeper.stdin.close()
        code = keeper.wait()
        assert code in (1, 2, -signal.SIGKILL), told
        return "refused" if code > 0 else "killed"
    if training.run.run_json.exists():
        check_latest_is_good(training.run)
    segment = training.start()
    deadline_s = time.monotonic() + LIFE_S
    while segment.process.poll() is None and keeper.poll() is None:
        assert time.monotonic() < deadline_s, "neither of the two ends"
        time.sleep(0.02)
    if segment.process.poll() is None:
        _vanish(segment)
    keeper.stdin.close()
    code = keeper.wait()
    assert code in (0, -signal.SIGKILL), keeper.stdout.read()
    return "killed" if code else "whole"


def _vanish(segment: Segment) -> None:
    os.kill(segment.process.pid, signal.SIGKILL)
    segment.finish()


def kill_until_complete(
    folder: Path, run_id: str, points: list[str], hurt: Callable[[], None]
) -> int:
    """Live until the run is whole in the bucket; how many kills that took."""
    num_kills = 0
    for number in range(MOST_LIVES):
        os.environ["HOLDFAST_SCRATCH"] = str(folder / f"{run_id}-{number}")
        training = Training(tier_folder(ADDRESS, "work"), run_id, overrides=OFTEN)
        hurt()
        end = live(training, points[num_kills] if num_kills < len(points) else NO_POINT)
        if end == "whole":
            return num_kills
        num_kills += end == "killed"
    raise AssertionError(f"{run_id} is not whole after {MOST_LIVES} lives")


def search_for_secrets(folder: Path) -> list[Path]:
    """Files that hold what must stand in none."""
    files = (path for path in folder.rglob("*") if path.is_file())
    secrets = [SECRET.encode(), KEY.encode()]
    return [path for path in files if any(one in path.read_bytes() for one in secrets)]


@contextmanager
def way() -> Iterator[FaultProxy]:
    """A server with a bucket, and the way to it, which the environment names."""
    with (
        pytest.MonkeyPatch.context() as patch,
        moto() as server,
        hurt_bucket(server, ADDRESS.bucket, patch) as proxy,
    ):
        require_fit(open_store(ADDRESS), str(ADDRESS))
        yield proxy


def _hurt(proxy: FaultProxy, rng: random.Random, share: float) -> None:
    proxy.hurt(*planned(rng, share))


def main() -> int:
    """Kill so many times in all. Returns 1 where bytes differ."""
    parser = argparse.ArgumentParser(prog="make chaos-store", description=__doc__)
    parser.add_argument("--kills", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.1, help="share of requests")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)  # of the processes that are started warm
    start_s, num_kills, seed = time.monotonic(), 0, arguments.seed
    with tempfile.TemporaryDirectory(prefix="holdfast-chaos-store-") as name, way() as proxy:
        folder = Path(name)
        calm = Training(folder / "calm", "calm", overrides=OFTEN)
        complete(calm)
        while num_kills < arguments.kills:
            rng = random.Random(seed)
            points = [f"{p}:{rng.randint(1, OFTEN_REACHED.get(p, 2))}" for p in STORE_POINTS]
            rng.shuffle(points)
            points.sort(key=lambda point: "late" in point)  # nothing is late in the first lives
            hurt = partial(_hurt, proxy, rng, arguments.faults)
            num_done = kill_until_complete(folder, f"seed-{seed}", points, hurt)
            proxy.hurt()
            os.environ["HOLDFAST_SCRATCH"] = str(folder / f"seed-{seed}-elsewhere")
            there = Training(tier_folder(ADDRESS, "work"), f"seed-{seed}")
            with opened_replica(there.run):
                wrong = differences(final_state(calm.run), final_state(there.run))
            wrong += [f"a secret in {path}" for path in search_for_secrets(folder)]
            num_kills += num_done
            print(f"seed {seed}: {num_done} kills, {wrong or 'the same bytes'}", flush=True)
            if wrong or seed > arguments.seed + 2 * arguments.kills:
                return 1
            seed += 1
    print(f"{num_kills} kills, {time.monotonic() - start_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
