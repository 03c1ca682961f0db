"""``holdfast run`` without a server: the whole pipeline, stopped and resumed, on digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from holdfast.tasks.run_summary import checkpoint_steps
from holdfast.training.runs.directory import RunDirectory, read_segments
from tests.flows.prefect_server import environment, wait_until

SETTINGS = ("--set", "train.num_epochs=60", "--set", "train.num_threads=1")
SETTINGS += ("--set", 'export.formats=["weights","onnx"]', "--set", "export.num_latency_runs=10")
SECRETS = {
    name: f"{name}-of-this-test".lower()
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PREFECT_API_KEY", "WANDB_API_KEY")
}
STATE_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class Terminal:
    """Where a person types: a store, and a Prefect home of the test."""

    store: Path
    environment: dict[str, str]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "holdfast", *arguments, "--store", str(self.store)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=280)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory, database_template: Path) -> Terminal:
    home = tmp_path_factory.mktemp("home")
    (home / "prefect.db").write_bytes(database_template.read_bytes())
    return Terminal(tmp_path_factory.mktemp("store"), environment(home, **SECRETS))


@pytest.fixture(scope="module")
def stopped(terminal: Terminal) -> tuple[RunDirectory, subprocess.Popen[str], str]:
    """A run that was stopped by Ctrl-C after its first checkpoint."""
    run = RunDirectory(terminal.store / "digits" / "stopped")
    process = terminal.start("run", "digits", "--run-id", "stopped", *SETTINGS)
    wait_until(lambda: bool(checkpoint_steps(run)) or process.poll() is not None, 200, "a save")
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=200)
    return run, process, err


@pytest.fixture(scope="module")
def resumed(
    stopped: tuple[RunDirectory, subprocess.Popen[str], str], terminal: Terminal
) -> tuple[RunDirectory, Any]:
    """The stopped run, taken up and completed, and what the command said of it."""
    code, out, err = terminal.run("resume", "stopped", "--json")
    assert code == 0, err
    return stopped[0], json.loads(out)["result"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same training, not interrupted, without Prefect."""
    store = tmp_path_factory.mktemp("whole")
    argv = ["--experiment", "digits", "--store", str(store), "--run-id", "whole", *SETTINGS]
    subprocess.run(
        [sys.executable, "-m", "holdfast.training", "segment", *argv, "--progress", "none"],
        check=True,
    )
    return RunDirectory(store / "digits" / "whole")


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_75(
    stopped: tuple[RunDirectory, subprocess.Popen[str], str], terminal: Terminal
) -> None:
    run, process, err = stopped
    assert process.returncode == 75, err
    assert err.splitlines()[0] == "training", "without a terminal, a line for each stage"
    assert "notice from signal: SIG" in err
    assert f"holdfast resume stopped --store {terminal.store}" in err
    assert read_segments(run)[-1].outcome == "preempted"
    assert checkpoint_steps(run)[-1] == read_segments(run)[-1].end_step


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_exits_with_130(terminal: Terminal) -> None:
    run = RunDirectory(terminal.store / "digits" / "at-once")
    process = terminal.start("run", "digits", "--run-id", "at-once", *SETTINGS)
    wait_until(lambda: bool(checkpoint_steps(run)) or process.poll() is not None, 200, "a save")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)  # two signals at the same moment are one
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "the last checkpoint counts" in err
    assert f"holdfast resume at-once --store {terminal.store}" in err


def test_a_stopped_run_leaves_no_process_behind(
    stopped: tuple[RunDirectory, subprocess.Popen[str], str], terminal: Terminal
) -> None:
    psutil = pytest.importorskip("psutil")

    def ours() -> list[str]:
        lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        return [line for line in lines if str(terminal.store) in line]

    wait_until(lambda: not ours(), 30, "all processes have ended", lambda: str(ours()))


def test_the_status_of_a_stopped_run_says_how_to_go_on(
    stopped: tuple[RunDirectory, subprocess.Popen[str], str], terminal: Terminal
) -> None:
    code, out, _ = terminal.run("status", "stopped")
    assert code == 0
    assert "preempted" in out
    assert "holdfast resume" in out


@pytest.mark.slow
def test_another_configuration_is_refused_for_the_same_run(
    stopped: tuple[RunDirectory, subprocess.Popen[str], str], terminal: Terminal
) -> None:
    run, _, _ = stopped
    before = read_segments(run)
    code, _, err = terminal.run("run", "digits", "--run-id", "stopped", "--set", "seed=5")
    assert code == 2, err
    assert "seed: 0 there, 5 here" in err
    assert len(err.splitlines()) == 2, "the stage, and one line"
    assert read_segments(run) == before


@pytest.mark.slow
def test_bad_settings_of_the_experiment_are_refused_before_a_run_is_begun(
    terminal: Terminal,
) -> None:
    arguments = ("--run-id", "bad", "--set", "experiment.nonsense=1")
    code, _, err = terminal.run("run", "digits", *arguments)
    assert code == 2, err
    assert "unknown key experiment.nonsense" in err
    assert not (terminal.store / "digits" / "bad" / "run.json").exists()


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bytes_of_the_whole_one(
    resumed: tuple[RunDirectory, Any], whole: RunDirectory
) -> None:
    run, result = resumed
    assert result["state"] == "completed"
    assert result["champion"]
    assert Path(result["bundle"]).is_dir()
    assert Path(result["report"]).is_file()
    assert result["published"] == "digits@1"
    assert result["promotion"] == "became champion: the first of its name"
    step = checkpoint_steps(whole)[-1]
    for name in STATE_FILES:
        there, here = run.checkpoint(step) / name, whole.checkpoint(step) / name
        assert there.read_bytes() == here.read_bytes(), name


@pytest.mark.slow
def test_a_completed_run_is_not_done_again(
    resumed: tuple[RunDirectory, Any], terminal: Terminal
) -> None:
    run, _ = resumed
    before = {path: path.stat().st_mtime_ns for path in run.bundle.rglob("*") if path.is_file()}
    segments = read_segments(run)
    start_s = time.monotonic()
    code, out, err = terminal.run("resume", "stopped")
    print(f"a completed run, once more: {time.monotonic() - start_s:.1f} s")
    assert code == 0, err
    assert "champion" in out
    assert read_segments(run) == segments
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_no_file_of_a_store_holds_a_secret_of_the_environment(
    resumed: tuple[RunDirectory, Any], terminal: Terminal
) -> None:
    assert resumed[0].bundle.is_dir()
    files = [path for path in terminal.store.rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        content = path.read_bytes().lower()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_of_several_processes_ends_with_a_published_bundle(terminal: Terminal) -> None:
    run = RunDirectory(terminal.store / "digits" / "several")
    several = [
        "distributed.strategy=ddp",
        "distributed.num_shards=4",
        "distributed.num_processes=3",
    ]
    overrides = [part for key in [*several, "train.num_epochs=2"] for part in ("--set", key)]
    code, out, err = terminal.run("run", "digits", "--run-id", "several", *SETTINGS, *overrides)
    assert code == 0, err
    assert "published     digits@" in out
    assert [record.num_processes for record in read_segments(run)] == [3]
    code, out, err = terminal.run("status", "several")
    assert "processes     3" in out
