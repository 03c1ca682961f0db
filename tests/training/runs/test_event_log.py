"""TensorBoard event files: one a segment, right over resumes, and never in training's way."""

from __future__ import annotations

import json
import logging
import random
import signal
from pathlib import Path

import pytest

from holdfast.training.configuration.schema import LoggingConfig
from holdfast.training.errors import ConfigError
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.runs.event_log import (
    EventLog,
    check_event_log,
    event_file,
    told_to_event_file,
)
from holdfast.training.runs.progress import Progress
from tests.faults.campaign import (
    Training,
    complete,
    differences,
    final_state,
    kill_until_complete,
)

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="the package tensorboard is not installed",
)
WITH_EVENTS = ("logging.tensorboard=true",)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard would show."""
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def history(run: RunDirectory) -> list[dict[str, object]]:
    newest = sorted(run.checkpoints.glob("step-*/state.json"))[-1]
    found: list[dict[str, object]] = json.loads(newest.read_text())["history"]
    return found


@pytest.mark.slow
def test_events_change_no_byte_of_a_killed_run_and_show_each_epoch_once(tmp_path: Path) -> None:
    calm = Training(tmp_path / "calm", "one")
    complete(calm)
    killed = Training(tmp_path / "killed", "one", overrides=WITH_EVENTS)
    first = killed.start()
    while (event := first.wait_for("validation")) and event["epoch"] != 2:
        pass
    first.kill(signal.SIGKILL)
    first.finish()
    kill_until_complete(killed, random.Random(4), num_kills=1, longest_life_s=0.6)
    assert differences(final_state(calm.run), final_state(killed.run)) == []
    records = history(killed.run)
    shown = scalars(killed.run.tensorboard, "train/loss")
    assert [step for step, _ in shown] == [record["step"] for record in records]
    assert [value for _, value in shown] == pytest.approx([r["train_loss"] for r in records])
    assert len(scalars(killed.run.tensorboard, "validation/accuracy")) == len(records)
    assert len(scalars(killed.run.tensorboard, "train/learning_rate")) == len(records)
    assert not calm.run.tensorboard.exists()


def test_steps_beyond_the_restored_one_are_dropped_whatever_the_clocks_say(tmp_path: Path) -> None:
    progress = Progress("none")
    with told_to_event_file(progress, event_file(tmp_path, 1), start_step=0):
        for step in (10, 20, 30):
            progress.emit("validation", step=step, train_loss=1.0, metrics={"loss": step / 10})
    with told_to_event_file(progress, event_file(tmp_path, 2), start_step=20):
        progress.emit("validation", step=25, train_loss=1.0, metrics={"loss": 7.0})
    progress.emit("validation", step=99, train_loss=1.0, metrics={"loss": 9.0})
    assert scalars(tmp_path, "validation/loss") == [(10, 1.0), (20, 2.0), (25, 7.0)]


def test_what_is_not_a_finite_number_is_left_out(tmp_path: Path) -> None:
    log = EventLog(event_file(tmp_path, 1), 0)
    log.listen("validation", {"step": 3, "train_loss": float("nan"), "metrics": {"loss": 1.0}})
    log.listen("saved", {"step": 3, "duration_s": 1.0})
    log.listen("progress", {"step": 4, "loss": 2.0, "steps_per_s": None})
    log.close()
    assert scalars(tmp_path, "train/loss") == []
    assert scalars(tmp_path, "validation/loss") == [(3, 1.0)]
    assert scalars(tmp_path, "step/loss") == [(4, 2.0)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = event_file(tmp_path, 1)
    path.symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        log = EventLog(path, 0)
        for step in range(3):
            log.listen("progress", {"step": step, "loss": 1.0})
        log.close()
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text


def test_asking_for_events_without_the_library_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_event_log(LoggingConfig())
    monkeypatch.setattr("holdfast.training.runs.event_log.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install 'holdfast"):
        check_event_log(LoggingConfig(tensorboard=True))
