"""Real processes, real signals: a killed run ends with the bytes of a calm one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from holdfast.training.runs.faultpoints import FAULT_POINTS
from holdfast.training.runs.losses import compare_losses
from tests.faults.campaign import (
    Training,
    complete,
    differences,
    final_state,
    kill_at_fault_point,
    kill_until_complete,
)

OFTEN = ("checkpoint.every_steps=5",)
COMMIT_POINTS = [name for name in FAULT_POINTS if not name.startswith(("restore.", "replace."))]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    training = Training(tmp_path_factory.mktemp("calm"), "calm")
    complete(training)
    return final_state(training.run)


@pytest.mark.parametrize(
    ("seed", "num_workers"), [(1, 0), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_random_kills_do_not_change_a_byte(
    tmp_path: Path, calm: dict[str, bytes], seed: int, num_workers: int
) -> None:
    training = Training(tmp_path, "killed", overrides=(*OFTEN, f"data.num_workers={num_workers}"))
    deeds = kill_until_complete(training, random.Random(seed), 4, longest_life_s=1.5)
    assert len(deeds) > 1, "the run completed before anything was killed"
    assert differences(calm, final_state(training.run)) == []
    assert compare_losses(training.run).num_different == 0


def test_kills_within_commits_do_not_change_a_byte(tmp_path: Path, calm: dict[str, bytes]) -> None:
    training = Training(tmp_path, "killed", overrides=OFTEN)
    points = ["write.between", "commit.after-manifest", "commit.after-rename", "prune.after-rename"]
    reached = [kill_at_fault_point(training, point, 2) for point in points]
    assert all(reached)
    complete(training)
    assert differences(calm, final_state(training.run)) == []


@pytest.mark.slow
@pytest.mark.parametrize("point", COMMIT_POINTS)
def test_a_kill_at_any_point_of_a_commit_does_not_change_a_byte(
    tmp_path: Path, calm: dict[str, bytes], point: str
) -> None:
    training = Training(tmp_path, "killed", overrides=OFTEN)
    num_reached = sum(kill_at_fault_point(training, point, count) for count in (1, 2, 3))
    assert num_reached > 0
    complete(training)
    assert differences(calm, final_state(training.run)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("train.precision=bf16",), id="bf16"),
        # It compiles for a minute, and again after each kill.
        pytest.param(("train.should_compile=true",), id="compile"),
    ],
)
def test_kills_of_other_arithmetic_do_not_change_a_byte(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    overrides = (*overrides, "train.num_epochs=3")
    calm = Training(tmp_path, "calm", overrides=overrides)
    complete(calm)
    killed = Training(tmp_path, "killed", overrides=(*OFTEN, *overrides))
    assert kill_at_fault_point(killed, "commit.after-rename", 2)
    complete(killed)
    assert differences(final_state(calm.run), final_state(killed.run)) == []


def test_a_training_that_is_not_exact_is_told_at_the_first_step_that_is_done_twice(
    tmp_path: Path,
) -> None:
    # The experiment counts its calls, and here does not keep the count.
    experiment = f"{Path(__file__).with_name('hard_experiment.py')}:Forgetful"
    often = (*OFTEN, "logging.every_s=0.0001")
    training = Training(tmp_path, "one", experiment, often)
    assert kill_at_fault_point(training, "save.before-snapshot", 2)
    found = complete(training)
    told = [line for line in found.errors if "was done again in segment 2" in line]
    assert len(told) == 1
    assert told[0].startswith("WARNING: step 6 ")
    assert compare_losses(training.run).num_different == 5

    strict = Training(tmp_path, "strict", experiment, often)
    assert kill_at_fault_point(strict, "save.before-snapshot", 2)
    segment = strict.start(arguments=["--strict"])
    assert segment.finish() == 2
    assert "--strict makes this warning an error" in segment.errors[-1]


def test_finishing_again_changes_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path, "again", overrides=("train.num_epochs=2",))
    complete(training)
    before = final_state(training.run)
    complete(training)
    assert differences(before, final_state(training.run)) == []
