"""What earlier versions wrote is resumed, reported, promoted and pulled by this one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from holdfast.training.configuration.loading import config_digest, resolve_config
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.experiment.loading import default_values, load_experiment, settings_class
from tests.compatibility.write_store import ENVIRONMENT, stage_command

ARCHIVES = sorted((Path(__file__).parent / "stores").glob("*.tar.xz"))
# Of each built-in experiment with nothing set, since version 0.1.0: a key that is added, or a
# default that is changed, must not alter them, or no run of before could be gone on with.
DEFAULT_DIGESTS = {
    "digits": "sha256:e83c7b9c2f036412705dd876c096a62fe7930a2cc1b66c7d0dc00e869cad9f87",
    "turbofan": "sha256:351b119da436faed08603dead9d5dd48b78ff0fe75465faa25d25b807fb2d7d0",
    "translation": "sha256:876960d1c82207821bbde56982e6d8451929149ec410df489b38f31f46cd0a85",
}


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.partition(".tar")[0])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as it was left; later tests see what earlier ones did to it."""
    folder = tmp_path_factory.mktemp("store")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def calm_here(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The bytes of the same configuration, trained on this machine by this version."""
    folder = tmp_path_factory.mktemp("here")
    stage(folder, "segment", "calm")
    return final_digests(folder / "digits" / "calm")


def stage(store: Path, name: str, run_id: str, *more: str) -> str:
    """Run a stage to its end; what it said on stderr."""
    command = [*stage_command("holdfast.training", name, store, run_id), *more]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def holdfast(*arguments: str) -> str:
    done = subprocess.run(
        python_command("holdfast", *arguments), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def final_digests(run: Path) -> Mapping[str, str]:
    """SHA-256 of the files of the last checkpoint; its manifest says when it was written."""
    folder = max((run / "checkpoints").glob("step-????????"))
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    return {
        f"{folder.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_there_is_a_store_of_every_version() -> None:
    assert ARCHIVES


@pytest.mark.parametrize("run_id", ["stopped", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_run_is_resumed_to_the_same_bytes(
    store: Path, run_id: str, calm_here: Mapping[str, str]
) -> None:
    run = store / "digits" / run_id
    assert final_digests(run).keys() != calm_here.keys(), "it had not come to its end"
    told = stage(store, "segment", run_id)
    assert "other code" not in told
    assert "another configuration" not in told
    found = final_digests(run)
    assert found.keys() == calm_here.keys()
    # Another processor rounds otherwise: then the first half, trained elsewhere, shows.
    if final_digests(store / "digits" / "calm") == calm_here:
        assert found == calm_here


def test_a_finished_run_is_shown_and_its_checkpoints_are_good(store: Path) -> None:
    assert "completed" in holdfast("status", "calm", "--store", str(store))
    holdfast("checkpoints", "verify", "calm", "--store", str(store))


def test_a_finished_run_is_reported(store: Path) -> None:
    (store / "digits" / "calm" / "report.html").unlink()
    stage(store, "report", "calm")
    assert "average-top-3" in (store / "digits" / "calm" / "report.html").read_text()


@pytest.mark.slow
def test_every_stage_of_a_finished_run_finds_its_own_work(store: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in (store / "digits/calm/bundle").rglob("*")}
    before = final_digests(store / "digits" / "calm")
    for name in ("segment", "candidates", "evaluate", "export", "promote"):
        stage(store, name, "calm", "--resume")
    assert final_digests(store / "digits" / "calm") == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_bundle_is_promoted_pulled_and_proved(store: Path, tmp_path: Path) -> None:
    holdfast("promote", "calm", "--store", str(store))
    holdfast("pull", "digits", "--store", str(store), "--to", str(tmp_path / "model"))
    holdfast("verify", str(tmp_path / "model"))
    subprocess.run([sys.executable, str(tmp_path / "model" / "verify.py")], check=True)


@pytest.mark.parametrize("name", DEFAULT_DIGESTS)
def test_a_configuration_keeps_its_digest(name: str) -> None:
    found = load_experiment(name)
    config = resolve_config(settings_class=settings_class(found), defaults=default_values(found))
    assert config_digest(config) == DEFAULT_DIGESTS[name]
