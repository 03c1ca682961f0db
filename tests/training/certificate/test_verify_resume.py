"""``verify-resume``: each hidden fault is named, and what has none is certified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("faulty_script.py")
HARD = Path(__file__).parents[2] / "faults" / "hard_experiment.py"
FAULTS = {
    "counter": "value num_calls was not kept",
    "own_draws": "generator own_draws was not kept",
    "prefetched": "tensor fetched[0] was not kept",
    "iterator": "iterator stream was not kept",
    "average": "network average.module.0.weight was not kept",
    "scheduler": "value scheduler.last_epoch was not kept",
    "optimizer": "optimizer optimizer.num_updates was not kept",
    "operator": "faulty.unsteady.default gives two results for the same input in step 1",
    "set order": "value weights[0].value differs between two calm runs",
    "time": "value begun_s differs between two calm runs",
    "plain loader": "iterator plain was not kept",
}
CLEAN = ("clean", "clean workers", "clean draws", "clean counter", "clean average")


def verify_resume(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "holdfast", "verify-resume", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_hidden_fault_is_named(fault: str) -> None:
    done = verify_resume("--steps", "20", "--stops", "2", "--", str(SCRIPT), fault)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert any(FAULTS[fault] in line for line in lines if line.startswith("cause")), done.stdout
    assert lines[-1] == "NOT exact: a run that is stopped ends with other bytes"
    assert any(line.startswith("loss     first differs at step ") for line in lines)


@pytest.mark.slow
def test_a_fault_is_named_where_the_first_kill_came_before_any_checkpoint() -> None:
    stops = ("--steps", "20", "--stops", "2", "--seed", "15")  # after steps 1 and 7
    done = verify_resume(*stops, "--", str(SCRIPT), "counter")
    assert "stopped by SIGKILL after step 1\n" in done.stderr
    assert f"cause    {FAULTS['counter']}: after step " in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", CLEAN)
def test_a_script_without_one_is_certified(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    words = ("--steps", "20", "--stops", "2", "--to", str(path), "--", str(SCRIPT), fault)
    done = verify_resume(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("exact    0 bytes differ (")
    certificate = json.loads(path.read_text())
    assert certificate["is_exact"]
    assert len(certificate["stops"]) == 2
    assert certificate["verdict"]["num_losses"] >= certificate["num_steps"] == 20


@pytest.mark.slow
def test_an_experiment_is_certified_or_its_fault_is_named() -> None:
    words = ("--steps", "12", "--stops", "1")
    done = verify_resume(f"{HARD}:Hard", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    done = verify_resume(f"{HARD}:Forgetful", *words)
    assert done.returncode == 1, done.stderr
    assert "_num_calls" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--", "missing.py"), 2, "there is no script missing.py"),
        pytest.param(
            ("digits", "turbofan"),
            2,
            "expected one experiment, found digits turbofan",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--set", "a=1", "--", str(SCRIPT)),
            2,
            "--config and --set are of experiments",
            marks=pytest.mark.slow,
        ),
        (("--budget-s", "1", "--", str(SCRIPT), "clean"), 3, "no verdict: 1 s were over"),
        (("--", str(Path(__file__))), 2, "wrote no run: it has to call holdfast.run"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = verify_resume(*arguments)
    assert (done.returncode, message in done.stderr.splitlines()[-1]) == (code, True), done.stderr
