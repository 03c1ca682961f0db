"""A scratch disk that fills up or is wiped while a run is trained in a bucket: one line, no byte.

The processes are those of a user: one trains, and who started it keeps the bucket.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.tiers.viewing import ALL, refresh_view
from tests.contracts.object_servers import make_bucket, moto
from tests.faults.campaign import HARD, Training, complete, differences, final_state
from tests.training.checkpointing.checkpoints import on_a_small_disk

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
pytest.importorskip("moto", reason="moto is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ADDRESS = Address("s3", "runs", "disks")
OVERRIDES = ("checkpoint.every_steps=3", "checkpoint.is_auto=false", "logging.every_s=0.0001")
COMMAND = python_command("holdfast.training", "segment", "--experiment", HARD)
COMMAND += ["--store", str(ADDRESS), "--run-id", "one", "--progress", "jsonl"]
COMMAND += [word for override in OVERRIDES for word in ("--set", override)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    with moto() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        make_bucket(environment, ADDRESS.bucket)
        yield {**child_environment(1), "HOLDFAST_REHEARSAL_DEPTH": "none", **environment}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    training = Training(tmp_path_factory.mktemp("calm"), "one", overrides=OVERRIDES)
    complete(training)
    return training.run


def train(
    environment: Mapping[str, str], scratch: Path, after_step_20: Callable[[], None] = lambda: None
) -> tuple[int, list[str]]:
    """Train, with something that happens in the middle; the exit code, and the lines of errors."""
    with subprocess.Popen(
        COMMAND,
        env={**environment, "HOLDFAST_SCRATCH": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "progress" and event["step"] == 20:
                after_step_20()
        errors = process.stderr.read().splitlines()
    return process.returncode, errors


def fill(path: Path) -> None:
    """Until there is no room, while others write, too."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def assert_one_line(code: int, errors: list[str]) -> None:
    assert code == 1, errors
    assert not [line for line in errors if "Traceback" in line], errors
    assert len([line for line in errors if line.startswith("error: ")]) == 1, errors


def assert_same_bytes(calm: RunDirectory, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HOLDFAST_SCRATCH", str(folder))
    run = refresh_view(ADDRESS, "one", also=(ALL,)) / calm.path.parent.name / "one"
    assert differences(final_state(calm), final_state(RunDirectory(run))) == []


def test_a_scratch_disk_that_fills_up(
    server: Mapping[str, str],
    calm: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    def act(folder: Path) -> None:
        code, errors = train(server, folder, lambda: fill(folder / "filling"))
        assert_one_line(code, errors)
        assert "free" in errors[-1], errors
        (folder / "filling").unlink()
        code, errors = train(server, folder)
        assert code == 0, errors

    on_a_small_disk(disk, act)
    assert_same_bytes(calm, tmp_path / "elsewhere", monkeypatch)


def test_a_scratch_disk_that_is_wiped(
    server: Mapping[str, str],
    calm: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    code, errors = train(server, scratch, lambda: shutil.rmtree(scratch, ignore_errors=True))
    assert_one_line(code, errors)
    code, errors = train(server, scratch)
    assert code == 0, errors
    assert_same_bytes(calm, tmp_path / "elsewhere", monkeypatch)
