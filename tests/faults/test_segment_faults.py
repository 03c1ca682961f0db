"""What a segment does with bad input and with a loss that is not a number."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.faults.campaign import Training, check_latest_is_good, complete


def run_to_failure(training: Training) -> tuple[int, str]:
    segment = training.start()
    code = segment.finish()
    return code, "".join(segment.errors)


def test_a_nan_loss_names_step_and_batch_and_saves_nothing(tmp_path: Path) -> None:
    # Three microbatches a step: the 40th call belongs to step 14, three steps into the epoch.
    training = Training(tmp_path, "nan", overrides=("experiment.nan_at_call=40",))
    code, errors = run_to_failure(training)
    assert code == 1
    assert "the loss of step 14 (batch 2 of its pass over the data) is nan" in errors
    assert [path.name for path in training.run.checkpoints.iterdir()] == ["step-00000011"]
    record = json.loads(training.run.segment(1).read_text())
    assert record["outcome"] == "failed"
    assert record["error"]["type"] == "NonFiniteLossError"


@pytest.mark.slow
def test_bad_values_end_with_2_before_anything_is_written(tmp_path: Path) -> None:
    for override, part in [
        ("train.num_epoch=1", "did you mean 'num_epochs'"),
        ("optimizer.name=AdamX", "optimizer.name"),
        ("selection.metric=f1", "is more of it better, or less?"),
        ('selection={metric="f1",mode="max"}', "selection.metric = 'f1' is not a metric"),
        ("train.device=cuda", "GPU"),
    ]:
        overrides = (override, "rehearsal.depth=step")
        training = Training(tmp_path / "store", "bad", overrides=overrides)
        code, errors = run_to_failure(training)
        assert (code, part in errors) == (2, True), errors
        assert "Traceback" not in errors
        assert not (tmp_path / "store").exists()


def test_another_configuration_on_the_same_run_id_is_refused(tmp_path: Path) -> None:
    complete(Training(tmp_path, "one", overrides=("train.num_epochs=1",)))
    code, errors = run_to_failure(Training(tmp_path, "one", overrides=("train.num_epochs=2",)))
    assert code == 2
    assert "train.num_epochs: 1 there, 2 here" in errors


def test_a_second_segment_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    endless = ("train.num_epochs=2000", "early_stopping.patience_epochs=2000")
    training = Training(tmp_path, "held", overrides=endless)
    first = training.start()
    first.wait_for("started")
    code, errors = run_to_failure(training)
    assert code == 1
    assert "lease" in errors
    first.kill(signal.SIGTERM)
    assert first.finish() == 75
    check_latest_is_good(training.run)


def test_a_notice_before_the_first_step_is_answered(tmp_path: Path) -> None:
    training = Training(tmp_path, "early")
    segment = training.start()
    segment.wait_for("started")
    segment.kill(signal.SIGTERM)
    assert segment.finish() == 75
    outcome = segment.events[-1]
    assert outcome["outcome"] == "preempted"


def test_a_damaged_segment_record_does_not_stop_the_run(tmp_path: Path) -> None:
    training = Training(tmp_path, "record", overrides=("train.num_epochs=1",))
    training.run.segments.mkdir(parents=True)
    training.run.segment(1).write_text("{")
    segment = complete(training)
    assert "segments/0001.json is not JSON" in "".join(segment.errors)


def test_a_notice_without_time_left_is_told_in_one_line(tmp_path: Path) -> None:
    training = Training(tmp_path, "late")
    segment = training.start({"SLURM_JOB_END_TIME": str(int(time.time()) - 5)})
    assert segment.finish() == 75
    told = "".join(segment.errors)
    assert "too little: stopping without a save" in told
    assert "Traceback" not in told


def test_an_outcome_file_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    training = Training(tmp_path / "store", "outcome")
    segment = training.start(arguments=["--outcome-file", str(tmp_path / "no" / "o.json")])
    assert segment.finish() == 2
    assert "--outcome-file" in segment.errors[-1]
    assert segment.events[-1]["exit_code"] == 2
    assert not (tmp_path / "store").exists()


def test_an_outcome_file_tells_input_errors_of_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    arguments = ["--outcome-file", str(path), "--config", "nowhere.toml"]
    segment = Training(tmp_path / "store", "outcome").start(arguments=arguments)
    assert segment.finish() == 2
    assert json.loads(path.read_text())["exit_code"] == 2
