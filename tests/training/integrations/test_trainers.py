"""Trainers that people have: killed and stopped, and the same bytes; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.losses import compare_losses
from holdfast.training.runs.paths import RunDirectory
from tests.faults.campaign import differences, final_state
from tests.warm_start import WarmProcess

FOLDER = Path(__file__).parent
TRAINERS = ("transformers", "lightning")
IMPORTED = ("transformers.trainer", "lightning.pytorch", "torchmetrics")
TIMEOUT_S = 240.0


def script(trainer: str, *arguments: str, folder: Path) -> tuple[int, str, str]:
    """Run a script with a store in ``folder``. Exit code, the last line, and errors."""
    folder.mkdir(exist_ok=True)
    path = FOLDER / f"{trainer}_script.py"
    words = ["store", *arguments]
    environment = {**child_environment(1), "TOKENIZERS_PARALLELISM": "false"}
    process = WarmProcess(words, environment, folder, path, IMPORTED)
    out, errors = process.communicate(TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, out.rstrip().rpartition("\n")[2], errors


def run_in(folder: Path) -> RunDirectory:
    return RunDirectory(folder / "store" / "points" / "one")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_training_that_is_stopped_ends_with_the_bytes_of_a_calm_one(
    tmp_path: Path, trainer: str
) -> None:
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    code, told, errors = script(trainer, folder=calm)
    assert (code, told.split()[:2]) == (0, ["done", "16"]), errors
    # A kill loses at least a step whose loss was written: saves are at 3, 6, 9, 12 and 15.
    for number, stop in enumerate(("8:SIGKILL", "10:SIGTERM", "14:SIGKILL")):
        workers = f"--workers={2 * (number % 2)}"
        code, _, errors = script(trainer, stop, workers, folder=stopped)
        assert code == (-9 if "KILL" in stop else 75), errors
    code, told_again, errors = script(trainer, "--workers=2", folder=stopped)
    assert code == 0, errors
    assert told_again == told  # what was logged, callbacks' metrics and the mean loss
    assert differences(final_state(run_in(calm)), final_state(run_in(stopped))) == []
    compared = compare_losses(run_in(stopped))
    assert (compared.num_compared > 0, compared.num_different) == (True, 0)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_training_that_ended_does_nothing_when_it_is_started_again(
    tmp_path: Path, trainer: str
) -> None:
    code, told, errors = script(trainer, "--fault=stops early", folder=tmp_path)
    assert code == 0, errors
    before = final_state(run_in(tmp_path))
    code, told_again, errors = script(trainer, "--fault=stops early", folder=tmp_path)
    assert code == 0, errors
    assert told_again.split()[:2] == told.split()[:2]
    assert differences(before, final_state(run_in(tmp_path))) == []
    assert len(read_segments(run_in(tmp_path))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_callback_that_raises_is_recorded_and_the_next_start_goes_on(
    tmp_path: Path, trainer: str
) -> None:
    code, _, errors = script(trainer, "8:SIGKILL", "--fault=raises", folder=tmp_path)
    assert code == 1
    assert "ValueError: the fan has stopped" in errors
    [segment] = read_segments(run_in(tmp_path))
    assert segment.outcome == "failed"
    code, told, errors = script(trainer, folder=tmp_path)
    assert (code, told.split()[:2]) == (0, ["done", "16"]), errors


def test_a_notice_before_the_first_step_is_answered(tmp_path: Path) -> None:
    code, _, errors = script("lightning", "--fault=early notice", folder=tmp_path)
    assert code == 75, errors
    assert [segment.outcome for segment in read_segments(run_in(tmp_path))] == ["preempted"]


REFUSED = {
    ("transformers", "no run"): "Trainer.train() found no run: call holdfast.run(",
    ("transformers", "hidden"): "the callback Ema has an AveragedModel in .average and tells no",
    ("transformers", "twice"): "it was called twice in one process",
    ("transformers", "resume"): "resume_from_checkpoint: the run goes on by itself",
    ("transformers", "stream"): "an IterableDataset cannot be gone back into",
    ("transformers", "best model"): "load_best_model_at_end and save_strategy='best' read",
    ("transformers", "batch size"): "auto_find_batch_size: set the batch size that fits",
    ("transformers", "data skip"): "ignore_data_skip trains on samples twice",
    ("transformers", "epoch stop"): "a callback ended an epoch early",
    ("lightning", "no run"): "Trainer.fit() found no run: call holdfast.run(",
    ("lightning", "hidden"): "the callback Hidden has an AveragedModel in .average and tells no",
    ("lightning", "resume"): "ckpt_path: the run goes on by itself; leave it out",
    ("lightning", "no loader"): "train_dataloader is a Batches, which cannot be gone back into",
    ("lightning", "two loaders"): "there is a second DataLoader for training",
    ("lightning", "clock"): "max_time and Timer end training by the clock",
}


@pytest.mark.parametrize(("trainer", "fault"), REFUSED)
def test_what_no_run_is_exact_with_is_refused_in_one_line(
    tmp_path: Path, trainer: str, fault: str
) -> None:
    code, _, errors = script(trainer, f"--fault={fault}", folder=tmp_path)
    told = [line for line in errors.splitlines() if REFUSED[trainer, fault] in line]
    assert code == 2, errors
    assert len(told) == 1, errors
    assert "Traceback" not in errors
