"""What a segment does when its disk is full, its checkpoints are damaged, or its lease is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.training.runs.paths import parse_step
from tests.faults.campaign import (
    Segment,
    Training,
    check_latest_is_good,
    complete,
    differences,
    final_state,
)
from tests.training.checkpointing.checkpoints import flip_bit, on_a_small_disk

TIMEOUT_S = 120.0
# Eleven steps an epoch, three calls of the loss a step; an epoch ends with a save.
IN_EPOCH_2, IN_EPOCH_3, LAST_OF_EPOCH_3 = 40, 70, 97
PAUSED = (
    f"experiment.pauses=[{IN_EPOCH_2}, {IN_EPOCH_3}, {LAST_OF_EPOCH_3}]",
    "checkpoint.is_auto=false",
    "logging.every_s=0.001",  # the segment's record meets the full disk, too
    "experiment.width=128",
    "train.num_epochs=5",
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    training = Training(tmp_path_factory.mktemp("calm"), "calm", overrides=PAUSED[1:])
    complete(training)
    return final_state(training.run)


def wait_until(is_so: Callable[[], bool], segment: Segment) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert segment.process.poll() is None, "".join(segment.errors)
        assert time.monotonic() < deadline_s, "".join(segment.errors)
        time.sleep(0.01)


def checkpoint_steps(training: Training) -> list[int]:
    names = (parse_step(path.name) for path in training.run.checkpoints.glob("*"))
    return sorted(step for step in names if step is not None)


def paused(store: Path, *overrides: str) -> Training:
    folder = store / "pauses"
    folder.mkdir()
    pauses = f"experiment.pause_folder={folder}"
    # Started anew: what others are forked from does not see a disk that is mounted here.
    return Training(store, "paused", overrides=(*PAUSED, pauses, *overrides), is_cold=True)


def reach(training: Training, segment: Segment, call: int) -> None:
    wait_until((training.store / "pauses" / f"{call}.reached").exists, segment)


def release(training: Training, call: int) -> None:
    (training.store / "pauses" / f"{call}.go").touch()


def fail_one_save(training: Training) -> tuple[Segment, Path]:
    """A training at the end of its third epoch whose second save found the disk full."""
    segment = training.start()
    reach(training, segment, IN_EPOCH_2)
    wait_until(lambda: checkpoint_steps(training) == [11], segment)
    filler = training.store / "filler"
    statistics = os.statvfs(training.store)
    filler.write_bytes(bytes(statistics.f_bavail * statistics.f_frsize - 2**16))
    release(training, IN_EPOCH_2)
    reach(training, segment, IN_EPOCH_3)
    time.sleep(1.0)  # the save of the second epoch fails in the background
    release(training, IN_EPOCH_3)
    reach(training, segment, LAST_OF_EPOCH_3)
    wait_until(lambda: any("the save of step 22 failed" in e for e in segment.errors), segment)
    assert checkpoint_steps(training) == [11]
    check_latest_is_good(training.run)
    return segment, filler


def test_training_goes_on_over_a_full_disk(tmp_path: Path, calm: dict[str, bytes]) -> None:
    def act(folder: Path) -> None:
        training = paused(folder)
        segment, filler = fail_one_save(training)
        filler.unlink()
        release(training, LAST_OF_EPOCH_3)
        assert segment.finish() == 0, "".join(segment.errors)
        assert differences(calm, final_state(training.run)) == []

    on_a_small_disk(tmp_path, act)


@pytest.mark.slow
def test_a_second_full_disk_in_a_row_ends_the_segment(
    tmp_path: Path, calm: dict[str, bytes]
) -> None:
    def act(folder: Path) -> None:
        training = paused(folder)
        segment, filler = fail_one_save(training)
        release(training, LAST_OF_EPOCH_3)
        assert segment.finish() == 1
        assert "are free" in segment.errors[-1], segment.errors
        assert checkpoint_steps(training) == [11]
        check_latest_is_good(training.run)
        filler.unlink()
        complete(training)
        assert differences(calm, final_state(training.run)) == []

    on_a_small_disk(tmp_path, act)


@pytest.mark.slow
def test_a_sleeper_finds_its_lease_gone_and_changes_nothing(
    tmp_path: Path, calm: dict[str, bytes]
) -> None:
    training = paused(tmp_path, "preemption.lease_ttl_s=1")
    sleeper = training.start()
    reach(training, sleeper, IN_EPOCH_2)
    wait_until(lambda: checkpoint_steps(training) == [11], sleeper)
    sleeper.kill(signal.SIGSTOP)
    time.sleep(1.5)
    for call in (IN_EPOCH_2, IN_EPOCH_3, LAST_OF_EPOCH_3):
        release(training, call)
    complete(training)
    before = final_state(training.run)
    sleeper.kill(signal.SIGCONT)
    assert sleeper.finish() == 1
    assert "lease" in sleeper.errors[-1]
    assert differences(before, final_state(training.run)) == []
    assert differences(calm, before) == []


def test_a_damaged_newest_checkpoint_is_set_aside_and_trained_again(
    tmp_path: Path, calm: dict[str, bytes]
) -> None:
    training = paused(tmp_path)
    first = training.start()
    release(training, IN_EPOCH_2)
    reach(training, first, IN_EPOCH_3)
    wait_until(lambda: checkpoint_steps(training) == [11, 22], first)
    first.kill(signal.SIGKILL)
    first.finish()
    flip_bit(training.run.checkpoint(22) / "optimizer.safetensors")
    for call in (IN_EPOCH_3, LAST_OF_EPOCH_3):
        release(training, call)
    second = complete(training)
    told = "".join(second.errors)
    assert "step-00000022/optimizer.safetensors" in told
    assert "set aside as step-00000022.damaged-1" in told
    assert training.run.checkpoint(22).with_name("step-00000022.damaged-1").is_dir()
    assert differences(calm, final_state(training.run)) == []


def test_checkpoints_of_another_configuration_are_refused_unless_asked_for(tmp_path: Path) -> None:
    overrides = (*PAUSED[1:4], "train.num_epochs=1")
    training = Training(tmp_path, "other", overrides=overrides)
    complete(training)
    training.run.run_json.unlink()  # else the run id itself is refused
    longer = Training(tmp_path, "other", overrides=(*overrides[:3], "train.num_epochs=2"))
    segment = longer.start()
    assert segment.finish() == 2
    assert "train.num_epochs: 1 there, 2 here" in segment.errors[-1]
    assert "--allow-mismatch" in segment.errors[-1]
    allowed = longer.start(arguments=["--allow-mismatch"])
    assert allowed.finish() == 0, "".join(allowed.errors)
    assert checkpoint_steps(longer) == [11, 22]
