"""What is refused before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.tasks.job import Job
from holdfast.tasks.preflight import check_job, store_path
from holdfast.training.errors import (
    ConfigError,
    DataNotFoundError,
    ExperimentError,
    HoldfastError,
    InputError,
    StorageError,
)
from holdfast.training.tiers.scratch import told_path, told_store


def job(tmp_path: Path, **changes: object) -> Job:
    values: dict[str, object] = {"experiment": "digits", "store": tmp_path / "runs", "run_id": "r"}
    return Job(**{**values, **changes})  # type: ignore[arg-type]


def test_a_sound_job_gives_its_configuration(tmp_path: Path) -> None:
    config = check_job(job(tmp_path, overrides=("train.num_epochs=3",)))
    assert config.train.num_epochs == 3


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"experiment": "digit"}, ExperimentError, "did you mean digits"),
        ({"experiment": "missing.py:Task"}, ExperimentError, "missing.py does not exist"),
        ({"run_id": "../else"}, InputError, "run id"),
        ({"overrides": ("train.num_epoch=3",)}, ConfigError, "num_epochs"),
        ({"overrides": ("train.num_epochs=0",)}, ConfigError, "train.num_epochs = 0"),
        ({"config_file": Path("/missing.toml")}, ConfigError, "/missing.toml"),
        ({"overrides": ("data.folder='/missing'",)}, DataNotFoundError, "/missing"),
        ({"is_resume": True}, InputError, "no run to resume"),
    ],
)
def test_bad_input_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], error: type[HoldfastError], part: str
) -> None:
    with pytest.raises(error, match=part) as raised:
        check_job(job(tmp_path, **changes))
    assert raised.value.exit_code == 2
    assert not (tmp_path / "runs" / "digits").exists()


def test_a_store_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="not writable"):
        check_job(job(tmp_path, store=tmp_path / "file" / "runs"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_without_permission_is_a_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="not writable"):
        check_job(job(tmp_path))


def test_a_store_is_a_path_or_a_file_uri() -> None:
    assert store_path("file:///mnt/my%20runs") == Path("/mnt/my runs")
    assert store_path("runs") == Path.cwd() / "runs"
    with pytest.raises(InputError, match="hdfs://"):
        store_path("hdfs://host/runs")


def test_a_bucket_is_a_folder_of_the_scratch_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    folder = store_path("s3://bucket/runs/")
    assert folder.is_relative_to(tmp_path / "scratch")
    assert folder == store_path("s3://bucket/runs")
    assert folder != store_path("s3://bucket/other")
    assert told_store(folder) == "s3://bucket/runs"
    assert told_path(folder / "digits" / "one" / "bundle") == "s3://bucket/runs/digits/one/bundle"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:2")
    assert folder != store_path("s3://bucket/runs")  # another server's bucket of the same name


def test_a_file_is_no_store(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match=r"file is a file, expected a folder"):
        store_path(str(file))
