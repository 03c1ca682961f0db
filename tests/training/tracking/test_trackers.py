"""Trackers have every step that a durable checkpoint covers, once, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from holdfast.training.configuration.schema import TrackingConfig
from holdfast.training.errors import ConfigError, DataFormatError
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.runs.directory import RunRecord, read_segments, utc_now
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.runs.losses import loss_path
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.progress import Progress
from holdfast.training.tracking.points import Point, durable_points
from holdfast.training.tracking.sending import Trackers
from holdfast.training.tracking.tracker import TRACKERS, check_trackers
from holdfast.training.tracking.wandb_files import offline_steps, whole_records
from tests.faults.campaign import Training, complete
from tests.generality.harness import OFTEN, stop_after

for library in TRACKERS:
    if find_spec(library) is None:  # imported by those who use it: mlflow takes seconds
        pytest.skip(f"the package {library} is not installed", allow_module_level=True)
Scalars = list[tuple[int, str, float]]
VALIDATED = ("train/learning_rate", "train/loss", "validation/loss")
TIMEOUT_S = 120.0


def make_run(folder: Path) -> RunDirectory:
    """A run of which nothing is done yet."""
    run = RunDirectory(folder / "points" / "one")
    run.losses.mkdir(parents=True)
    run.checkpoints.mkdir()
    record = RunRecord(
        run_id="one",
        experiment="points",
        config={"train": {"num_epochs": 2}, "data": {"folder": None}},
        config_digest="sha256:0",
        created_at=utc_now(),
    )
    write_json_durably(run.run_json, record.model_dump(mode="json"))
    return run


def keep_losses(run: RunDirectory, segment: int, first: int, last: int) -> None:
    """Losses of the steps; that of a step is its hundredth."""
    losses = [step / 100 for step in range(first, last + 1)]
    loss_path(run, segment, first).write_bytes(struct.pack(f"<{len(losses)}d", *losses))


def save(run: RunDirectory, step: int, *validated: int) -> None:
    """A durable full checkpoint, with epochs that ended after these steps."""
    history = [
        {
            "epoch": number,
            "step": at,
            "train_loss": 0.5,
            "learning_rate": 0.1,
            "metrics": {"loss": at / 10},
        }
        for number, at in enumerate(validated)
    ]
    run.checkpoint(step).mkdir()
    write_json_durably(run.checkpoint(step) / "state.json", {"history": history})


def expected(last: int, *validated: int) -> Scalars:
    steps = [(step, "step/loss", step / 100) for step in range(1, last + 1)]
    for at in validated:
        steps += [(at, tag, v) for tag, v in zip(VALIDATED, (0.1, 0.5, at / 10), strict=True)]
    return sorted(steps)


def in_tensorboard(run: RunDirectory) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    size_guidance = {"scalars": 0}
    events = EventAccumulator(str(run.tracking / "tensorboard"), size_guidance)
    events.Reload()
    tags = events.Tags()["scalars"]
    return sorted((e.step, tag, e.value) for tag in tags for e in events.Scalars(tag))


def database(run: RunDirectory) -> Path:
    return run.tracking / "mlflow.db"


def in_mlflow(run: RunDirectory) -> Scalars:
    from mlflow import MlflowClient

    path = database(run)
    if not path.exists():
        return []
    client = MlflowClient(f"sqlite:///{path}")
    experiments = client.search_experiments(filter_string=f"name = '{run.path.parent.name}'")
    runs = client.search_runs([one.experiment_id for one in experiments])
    assert len(runs) <= 1
    return sorted(
        (metric.step, tag, metric.value)
        for one in runs
        for tag in one.data.metrics
        for metric in client.get_metric_history(one.info.run_id, tag)
    )


def in_wandb(run: RunDirectory) -> Scalars:
    assert len({path.stem for path in run.tracking.glob("wandb/wandb/offline-run-*/*.wandb")}) <= 1
    steps = offline_steps(run.tracking / "wandb")
    return sorted((step, tag, value) for step, values in steps for tag, value in values.items())


READERS: dict[str, Callable[[RunDirectory], Scalars]] = {
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "wandb": in_wandb,
}


def start(run: RunDirectory, names: Sequence[str]) -> subprocess.Popen[bytes]:
    asked = json.dumps({"to": names, "project": None})
    hidden = {name: value for name, value in os.environ.items() if "MLFLOW" not in name}
    return subprocess.Popen(
        python_command("holdfast.training.tracking.process", str(run.path), asked),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**hidden, "WANDB_MODE": "offline"},
        start_new_session=True,
    )


def assert_sent(run: RunDirectory, name: str, wanted: Scalars) -> None:
    found = READERS[name](run)
    assert [(step, tag) for step, tag, _ in found] == [(step, tag) for step, tag, _ in wanted]
    assert [value for *_, value in found] == pytest.approx([value for *_, value in wanted])


def has_any(run: RunDirectory, name: str) -> bool:
    """Whether a tracker's files have a step; those of a database that is being made have none."""
    if name == "mlflow":
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(database(run))) as found:
            return found.execute("SELECT count(*) FROM metrics").fetchone()[0] > 0
        return False
    is_begun = any(path.is_file() for path in (run.tracking / name).rglob("*"))
    return is_begun and bool(READERS[name](run))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "wandb" else name for name in TRACKERS],
)
def test_a_tracker_has_each_step_once_after_its_process_was_killed(
    tmp_path: Path, name: str
) -> None:
    run = make_run(tmp_path)
    keep_losses(run, 1, 1, 60)
    save(run, 40, 20, 40)
    with start(run, [name]) as first:
        end_s = time.monotonic() + TIMEOUT_S
        while not has_any(run, name) and time.monotonic() < end_s:
            time.sleep(0.1)
        for process in [*psutil.Process(first.pid).children(recursive=True), first]:
            process.kill()
        first.communicate()
    keep_losses(run, 2, 41, 90)
    save(run, 80, 20, 40, 60, 80)
    with start(run, [name]) as second:
        _, errors = second.communicate(b"saved\ncompleted\n", TIMEOUT_S)
    assert second.returncode == 0, errors.decode()
    assert_sent(run, name, expected(80, 20, 40, 60, 80))


@pytest.mark.parametrize("num_bytes", [1, 100, 32_740, 32_754, 32_755, 32_760, 100_000])
def test_records_of_a_log_are_read_whole_or_not_at_all(tmp_path: Path, num_bytes: int) -> None:
    records = [bytes([number]) * num_bytes for number in range(1, 4)]
    content = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
    for record in records:
        content += in_blocks(record, len(content))
    assert [*whole_records(content, tmp_path)] == records
    assert [*whole_records(content[:-1], tmp_path)] == records[:-1]
    assert [*whole_records(b"", tmp_path)] == []
    with pytest.raises(DataFormatError, match="W&B has another format"):
        [*whole_records(b"other" + content, tmp_path)]


def in_blocks(record: bytes, place: int) -> bytes:
    """As LevelDB's format says: parts that do not cross blocks of 32 KiB."""
    written, is_first = b"", True
    while is_first or record:
        left = 32768 - (place + len(written)) % 32768
        if left < 7:
            written += bytes(left)
            continue
        part, record = record[: left - 7], record[left - 7 :]
        kind = (1 if is_first else 4) if not record else (2 if is_first else 3)
        written += struct.pack("<IHB", 0, len(part), kind) + part
        is_first = False
    return written


def test_what_no_durable_checkpoint_covers_is_not_sent(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    keep_losses(run, 1, 1, 9)
    assert [*durable_points(run, {})] == []
    save(run, 4, 4)
    run.checkpoint(8).mkdir()  # of weights alone
    assert [point.step for point in durable_points(run, {})] == [1, 2, 3, 4]
    rest = [*durable_points(run, {"step/loss": 4, "train/loss": 4})]
    assert rest == [Point(4, {"train/learning_rate": 0.1, "validation/loss": 0.4})]


def test_a_tracker_that_fails_is_told_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path)
    (run.path / "tracking").mkdir()
    (run.path / "tracking" / "tensorboard").write_text("in the way")
    trackers = Trackers(run, TrackingConfig(to=("tensorboard",)), Progress("none"))
    trackers.start()
    trackers.is_completed = True
    trackers.close()
    assert "a tracker has failed, see " in caplog.text
    assert "tensorboard is given up until the next start" in (run.logs / "tracking.log").read_text()


def test_a_library_that_is_missing_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(TrackingConfig())
    monkeypatch.setattr("holdfast.training.tracking.tracker.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'holdfast\[mlflow\]'"):
        check_trackers(TrackingConfig(to=("mlflow",)))


@pytest.mark.slow
def test_a_training_that_is_killed_has_one_run_in_each_tracker(tmp_path: Path) -> None:
    tracking = 'tracking.to=["tensorboard","mlflow","wandb"]'
    training = Training(tmp_path, "one", overrides=(*OFTEN, "train.num_epochs=2", tracking))
    stop_after(training, signal.SIGKILL, 7)
    stop_after(training, signal.SIGKILL, 16)
    for process in psutil.process_iter(["cmdline"]):  # the machine takes the tracker with it
        if str(training.run.path) in (process.info["cmdline"] or []):
            process.kill()
    complete(training)
    last = read_segments(training.run)[-1].end_step
    losses = [(step, tag) for step, tag, _ in READERS["mlflow"](training.run) if tag == "step/loss"]
    assert losses == [(step, "step/loss") for step in range(1, last + 1)]
    wanted = READERS["mlflow"](training.run)
    assert len([tag for _, tag, _ in wanted if tag == "validation/loss"]) == 2
    for name in ("tensorboard", "wandb"):
        assert_sent(training.run, name, wanted)
