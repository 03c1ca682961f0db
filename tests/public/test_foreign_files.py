"""No file of a user's folder, nor of a bundle, runs in the place of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.campaign import Training, differences, final_state

PROGRAMS = Path(sys.executable).parent
# Names that a project of machine learning has, and names of what we import.
FOREIGN = ("tasks", "utils", "json", "torch", "click", "typing", "numpy", "holdfast", "pydantic")
FOREIGN_PACKAGES = ("flows", "data", "models", "prefect", "multiprocessing")
EXPERIMENT = """
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from training.layers import hidden  # the project's own package, not ours
from training.points import Points


class Mine:
    defaults = {
        "train": {"num_epochs": 3},
        "data": {"batch_size": 8, "num_workers": 1},
        "optimizer": {"args": {"lr": 0.01}},
        "export": {"formats": ["weights", "onnx"], "num_latency_runs": 10},
    }

    def __init__(self, context):
        pass

    def dataset(self, split):
        return Points(["train", "validation", "test"].index(split))

    def model(self):
        return nn.Sequential(hidden(6), nn.ReLU(), nn.Linear(16, 2))

    def loss(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model, batch):
        logits = model(batch[0])
        correct = (logits.argmax(1) == batch[1]).float()
        return {"loss": cross_entropy(logits, batch[1], reduction="none"), "correct": correct}

    def metrics(self, records):
        return {"loss": float(records["loss"].mean()), "accuracy": float(records["correct"].mean())}
"""
LAYERS = "from torch import nn\n\n\ndef hidden(width):\n    return nn.Linear(width, 16)\n"
POINTS = """
import torch


class Points:
    def __init__(self, seed):
        draws = torch.Generator().manual_seed(seed)
        self.points = torch.randn(64, 6, generator=draws)
        self.labels = (self.points[:, 0] * self.points[:, 1] > 0).long()

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.points[index] + 0.1 * torch.randn(6), self.labels[index]
"""


def poison(folder: Path, names: Sequence[str], packages: Sequence[str]) -> Path:
    """Files that leave a mark when they run, and then fail."""
    mark = folder / "ran"
    source = (
        f"with open({str(mark)!r}, 'a') as f: f.write(__name__ + '\\n')\nraise SystemExit('ran')\n"
    )
    for name in names:
        (folder / f"{name}.py").write_text(source)
    for name in packages:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    return mark


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    poison(folder, FOREIGN, FOREIGN_PACKAGES)
    (folder / "my_task.py").write_text(EXPERIMENT)
    (folder / "training").mkdir()
    (folder / "training" / "__init__.py").touch()
    (folder / "training" / "layers.py").write_text(LAYERS)
    (folder / "training" / "points.py").write_text(POINTS)
    return folder


def run(folder: Path, *command: str, code: int = 0) -> str:
    """Run a command in a folder; what it printed. No file of the folder may have run."""
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert not (folder / "ran").exists(), (folder / "ran").read_text()
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


def segment(folder: Path, reference: str, run_id: str, *python: str) -> list[str]:
    command = [sys.executable, *python, "-m", "holdfast.training", "segment"]
    command += ["--experiment", reference, "--store", "runs", "--run-id", run_id]
    return [*command, "--set", "logging.every_s=0.001", "--progress", "jsonl"]


@pytest.fixture(scope="module")
def elsewhere(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of the same experiment, trained where nothing is in the way."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "my_task.py").write_text(EXPERIMENT)
    (folder / "training").symlink_to(project / "training")
    run(folder, *segment(folder, "my_task.py:Mine", "r"))
    return final_state(Training(folder / "runs", "r", "my_task.py:Mine").run)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["my_task.py:Mine", "my_task:Mine"])
def test_a_project_with_names_like_ours_trains_to_the_bytes_of_elsewhere(
    project: Path, elsewhere: dict[str, bytes], reference: str
) -> None:
    run_id = "file" if ".py" in reference else "module"
    command = segment(project, reference, run_id, "-P")
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen(
            command, cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if '"progress"' in line)
            process.send_signal(number)
            process.stdout.read()
        assert process.returncode in (-signal.SIGKILL, 75)
    run(project, *command)
    found = final_state(Training(project / "runs", run_id, reference).run)
    assert differences(elsewhere, found) == []


@pytest.mark.slow
def test_without_the_flag_our_files_come_first_as_well(project: Path) -> None:
    (project / "holdfast.py").unlink()  # Python itself would find that one first
    run(project, *segment(project, "my_task.py:Mine", "unflagged"))


@pytest.mark.slow
def test_the_whole_pipeline_runs_in_such_a_project(project: Path) -> None:
    command = [str(PROGRAMS / "holdfast"), "run", "my_task.py:Mine", "--run-id", "whole"]
    told = run(project, *command, "--set", "ema.decays=[]")
    assert "published" in told


COMMANDS = [
    ("status", "whole"),
    ("checkpoints", "list", "whole"),
    ("checkpoints", "verify", "whole"),
    ("bundles",),
    ("report", "whole"),
    ("promote", "whole"),
    ("pull", "my_task.Mine", "--to", "copy"),
    ("verify", "."),
    ("--help",),
]


@pytest.fixture(scope="module")
def hostile_bundle(project: Path) -> Path:
    """A bundle's folder with modules in it that nobody asked for, and another copy beside it."""
    folder = project / "bundle-copy"
    store = str(project / "runs")
    run(
        project,
        str(PROGRAMS / "holdfast"),
        "pull",
        "my_task.Mine",
        "--store",
        store,
        "--to",
        str(folder),
    )
    poison(folder, ("training", *FOREIGN), ("prefect", "multiprocessing"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_no_command_runs_what_lies_in_a_bundle(
    project: Path, hostile_bundle: Path, command: tuple[str, ...]
) -> None:
    needs_store = command[0] not in ("verify", "--help")
    where = ["--store", str(project / "runs")] if needs_store else []
    # What is not of the bundle is refused by verify, and by nothing else.
    code = 1 if command[0] == "verify" else 0
    run(hostile_bundle, str(PROGRAMS / "holdfast"), *command, *where, code=code)


@pytest.mark.slow
def test_the_doctor_runs_nothing_of_it_either(hostile_bundle: Path, tmp_path: Path) -> None:
    subprocess.run(
        [PROGRAMS / "holdfast", "doctor", "--store", tmp_path], cwd=hostile_bundle, check=False
    )
    assert not (hostile_bundle / "ran").exists()
