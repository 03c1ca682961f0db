"""The commands of the README do what it says, as they are printed there.

Each block is named by a comment above it. Blocks that belong together run in one shell, in a
folder of the test, with a Prefect home and a port of the test.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdfast.training.runs.directory import RunDirectory, read_segments
from tests.documentation.printed import blocks, run_script, unnamed_commands
from tests.flows.prefect_server import REPOSITORY, environment, free_port

README = REPOSITORY / "README.md"
MAKE_RUN_AND_TEST = 1
END_ALL = "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n"


def run_as_printed(folder: Path, *names: str, timeout_s: float = 280.0, before: str = "") -> str:
    """Run blocks one after another; what they print."""
    port = str(free_port())
    printed = blocks(README)
    script = before + "".join(printed[name] for name in names).replace(":4200/", f":{port}/")
    home = folder / "prefect"
    home.mkdir(exist_ok=True)
    # A server that is started with its output in a pipe ends with the first line that it logs.
    talks = {"PREFECT_LOGGING_SERVER_LEVEL": "INFO"}
    variables = environment(home, PREFECT_SERVER_API_PORT=port, **talks)
    return "".join(run_script(folder, script, variables, timeout_s))


def test_every_block_of_commands_is_tested() -> None:
    untested = unnamed_commands(README)
    assert len(untested) == MAKE_RUN_AND_TEST, untested
    assert "make run" in untested[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_to_its_bundle_and_the_bundle_elsewhere(tmp_path: Path) -> None:
    told = run_as_printed(tmp_path, "run", "pull", timeout_s=880)
    assert told.count("champion      ") == 3, "of run, status and resume"
    assert "digits@1" in told
    assert "golden outputs are right" in told


def test_training_alone(tmp_path: Path) -> None:
    run_as_printed(tmp_path, "segment")
    assert list((tmp_path / "runs/digits/fifth/checkpoints").glob("step-*/model.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_experiment_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(blocks(README)["my_task.py"])
    told = run_as_printed(tmp_path, "check", "own", timeout_s=880)
    assert "my_task.py:Spirals is fit to be trained" in told
    assert float(re.findall(r"accuracy ([\d.]+)", told)[0]) > 0.95


@pytest.mark.slow
@pytest.mark.timeout(2500)
def test_workers_automatic_resume_and_nights(tmp_path: Path) -> None:
    names = ("deploy", "resume", "nightly")
    told = run_as_printed(tmp_path, *names, timeout_s=2400, before=END_ALL)
    assert (tmp_path / "runs/digits/third/bundle").is_dir()
    assert (tmp_path / "runs/digits/fourth/bundle").is_dir()
    outcomes = [s.outcome for s in read_segments(RunDirectory(tmp_path / "runs/digits/fourth"))]
    assert outcomes == ["preempted", "completed"], told
