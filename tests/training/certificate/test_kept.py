"""The certificate travels with the run, and says where it is of another training than this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from holdfast.flows.command_line.group import holdfast
from holdfast.training.bundles.model_card import _about_certificate
from holdfast.training.certificate.certifying import Certificate
from holdfast.training.certificate.command import _target
from holdfast.training.certificate.kept import keep_certificate, read_certificate
from holdfast.training.certificate.verdict import Verdict
from holdfast.training.errors import DataFormatError, InputError
from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.exactness.trial import Trial
from holdfast.training.own_loop.environment import STORE
from holdfast.training.runs.directory import RunRecord, read_run_record, utc_now
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.runs.paths import RunDirectory
from tests.faults.campaign import Training, complete
from tests.generality.harness import OFTEN
from tests.warm_start import WarmProcess

SCRIPT = Path(__file__).with_name("faulty_script.py")
HARD = f"{Path(__file__).parents[2] / 'faults' / 'hard_experiment.py'}:Hard"
VERSIONS = {"torch": "2.11.0"}
WORDS = ("--steps", "12", "--stops", "1")


def run_of(folder: Path, **changed: object) -> tuple[RunDirectory, RunRecord]:
    run = RunDirectory(folder / "points" / "one")
    run.path.mkdir(parents=True)
    record = RunRecord(
        run_id="one",
        experiment="points",
        config={},
        config_digest="sha256:c",
        experiment_digest="sha256:e",
        versions=VERSIONS,
        created_at=utc_now(),
    ).model_copy(update=changed)
    write_json_durably(run.run_json, record.model_dump(mode="json"))
    return run, record


def certificate(verdict: Verdict) -> Certificate:
    return Certificate(
        target="/home/somebody/train.py",
        num_steps=40,
        stops=((3, "SIGKILL"), (9, "SIGTERM")),
        is_repeatable=None,
        verdict=verdict,
        made_with={
            "made_at": "2026-01-31T12:00:00.000000Z",
            "device": "cpu",
            "versions": VERSIONS,
            "code_digest": "sha256:e",
            "config_digest": "sha256:c",
        },
    )


def test_a_certificate_of_this_run_is_shown(tmp_path: Path) -> None:
    run, record = run_of(tmp_path)
    assert read_certificate(run, record) is None
    keep_certificate(run, certificate(Verdict(7, 40)).as_json())
    found = read_certificate(run, record)
    assert found is not None
    assert found.is_good
    assert found.told() == "exact, 0 bytes differ after 2 stops in 40 steps on cpu, 2026-01-31"
    page = CliRunner().invoke(holdfast, ["status", str(run.path)]).output
    assert "certificate   exact, 0 bytes differ after 2 stops" in page
    told = CliRunner().invoke(holdfast, ["status", str(run.path), "--json"]).output
    assert json.loads(told)["certificate"] == found.as_json()
    [sentence, _] = _about_certificate(json.loads(json.dumps(found.as_json())))
    assert "stopped 2 times in 40 steps had the bytes of one that was not" in sentence
    assert "somebody" not in json.dumps(found.as_json())


def test_one_that_found_a_difference_says_so_whatever_the_losses_were(tmp_path: Path) -> None:
    run, record = run_of(tmp_path)
    verdict = Verdict(7, 40, first_step=4, losses=(0.5, float("nan")), num_differences=3)
    keep_certificate(run, certificate(verdict).as_json())
    found = read_certificate(run, record)
    assert found is not None
    assert found.told().startswith("NOT exact, other bytes after 2 stops")
    assert _about_certificate(asdict(found)) == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"experiment_digest": "sha256:f"}, "code"),
        ({"config_digest": "sha256:d"}, "configuration"),
        ({"versions": {"torch": "2.12.0"}}, "versions"),
        ({"experiment_digest": None, "config_digest": "d"}, "code and configuration"),
    ],
)
def test_one_of_another_training_says_so(
    tmp_path: Path, changed: dict[str, object], what: str
) -> None:
    run, record = run_of(tmp_path, **changed)
    keep_certificate(run, certificate(Verdict(7, 40)).as_json())
    found = read_certificate(run, record)
    assert found is not None
    assert not found.is_good
    assert found.told() == f"one is there, of other {what} than this run's"
    assert _about_certificate(asdict(found)) == []


def test_a_spoilt_one_is_told_with_its_field(tmp_path: Path) -> None:
    run, record = run_of(tmp_path)
    write_json_durably(run.certificate_json, {"is_exact": True, "num_steps": 4, "stops": 3})
    with pytest.raises(DataFormatError, match=r"certificate\.json.*stops"):
        read_certificate(run, record)


def test_sigterm_ends_it_with_75_and_leaves_no_process_behind() -> None:
    command = [*python_command("holdfast", "verify-resume", *WORDS), "--", str(SCRIPT), "clean"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    with process:
        assert process.stderr is not None
        assert process.stderr.readline() == "a calm run\n"
        end_s = time.monotonic() + 60
        lives: list[psutil.Process] = []
        while not lives and time.monotonic() < end_s:
            below = psutil.Process(process.pid).children(recursive=True)
            lives = [one for one in below if str(SCRIPT) in one.cmdline()[:2]]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        told = process.stderr.read()
    assert process.returncode == 75, told
    assert told.splitlines()[-1] == "no verdict: stopped by SIGTERM; begin it again"
    assert lives
    assert psutil.wait_procs(lives, timeout=10)[1] == []


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path)
    with pytest.raises(InputError, match="expected an experiment, -- and a script, or --run"):
        _target((), None, None, ())
    with pytest.raises(InputError, match="--run is a run as it is: leave TARGET, --config and"):
        _target(("digits",), run, None, ())
    with pytest.raises(InputError, match="--run is a run as it is"):
        _target((), run, None, ("seed=1",))
    with pytest.raises(InputError, match="there is no run at"):
        _target((), RunDirectory(tmp_path), None, ())


def verified(run: RunDirectory) -> None:
    words = ("verify-resume", *WORDS, "--run", str(run.path))
    command = [sys.executable, "-P", "-m", "holdfast", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=run.path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_certificate(run, read_run_record(run))
    assert found is not None
    assert found.is_good, found.told()
    assert found.num_steps == 12


@pytest.mark.slow
def test_the_training_of_a_scripts_run_is_tried(tmp_path: Path) -> None:
    surroundings = {**child_environment(1), STORE: str(tmp_path), **Trial(end_at=6).environment()}
    process = WarmProcess(["clean"], surroundings, tmp_path, SCRIPT)
    process.communicate(120)
    assert process.returncode == 0
    verified(RunDirectory(tmp_path / "faulty" / "one"))


@pytest.mark.slow
def test_the_training_of_an_experiments_run_is_tried_with_its_configuration(
    tmp_path: Path,
) -> None:
    training = Training(tmp_path, "one", HARD, (*OFTEN, "train.num_epochs=2", "seed=7"))
    complete(training)
    verified(training.run)
