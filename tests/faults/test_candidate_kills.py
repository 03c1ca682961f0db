"""The candidates of a stage that is killed again and again are those of a calm one, to the byte."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.faults.campaign import Training, complete, differences

OVERRIDES = ("ema.posthoc_gammas=[16.97,6.94]", "train.num_epochs=5")
NUM_KILLS = 2
MAX_LIVES = 5


def candidates(training: Training) -> dict[str, bytes]:
    folder = training.run.candidates
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def kill_once(training: Training, rng: random.Random, after: int) -> bool:
    """Kill a stage a moment after it began to make a candidate. Whether it was still at work."""
    stage = training.start(stage="candidates")
    for _ in range(after):
        stage.wait_for("progress")
    time.sleep(rng.uniform(0, 0.1))
    stage.kill(signal.SIGKILL)
    code = stage.finish()
    assert code in (0, -signal.SIGKILL), "".join(stage.errors)
    return code != 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(tmp_path_factory.mktemp("trained"), "trained", overrides=OVERRIDES)
    complete(training)
    return training


def copy(training: Training, store: Path) -> Training:
    shutil.copytree(training.store, store)
    return Training(store, training.run_id, overrides=training.overrides)


def test_killed_stages_leave_the_candidates_of_a_calm_one(
    trained: Training, tmp_path: Path
) -> None:
    calm, killed = copy(trained, tmp_path / "calm"), copy(trained, tmp_path / "killed")
    assert calm.start(stage="candidates").finish() == 0
    expected = candidates(calm)
    num_candidates = sum(name.endswith("provenance.json") for name in expected)
    rng, num_kills = random.Random(7), 0
    for _ in range(MAX_LIVES):
        # Further on each time, so that each kill finds candidates that are there, and others not.
        after = 1 + num_kills * num_candidates // NUM_KILLS
        num_kills += kill_once(killed, rng, after)
        if num_kills == NUM_KILLS:
            break
    assert num_kills > 0, "no kill found the stage at work"
    assert killed.start(stage="candidates").finish() == 0
    assert differences(expected, candidates(killed)) == []
