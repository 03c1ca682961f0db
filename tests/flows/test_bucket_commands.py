"""Commands whose store is a bucket, as they are typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.tiers.keeping import kept_up, opened_replica
from holdfast.training.tiers.scratch import tier_folder
from tests.contracts.object_servers import SECRET, make_bucket, moto
from tests.faults.campaign import Training, complete

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
pytest.importorskip("moto", reason="moto is not installed")
STORE = "s3://runs/team"
QUICK = ("train.num_epochs=2", 'export.formats=["weights","onnx"]', "export.num_latency_runs=10")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A bucket with a run that was trained on another machine, and this machine's scratch."""
    with moto() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.items():
            patch.setenv(name, value)
        make_bucket(server, "runs")
        patch.setenv("HOLDFAST_SCRATCH", str(tmp_path_factory.mktemp("other")))
        work = tier_folder(Address("s3", "runs", "team"), "work")
        training = Training(work, "first", "digits", QUICK[:1])
        with opened_replica(RunDirectory(work / "digits" / "first")) as replica, kept_up(replica):
            complete(training)
        yield {**server, "HOLDFAST_SCRATCH": str(tmp_path_factory.mktemp("scratch"))}


def holdfast(
    environment: dict[str, str], *arguments: str, store: str = STORE
) -> subprocess.CompletedProcess[str]:
    code = "from holdfast.flows.command_line.entry_point import main; main()"
    command = [sys.executable, "-P", "-c", code, *arguments, "--store", store]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_a_run_is_seen_from_a_machine_that_has_nothing_of_it(environment: dict[str, str]) -> None:
    [row] = json.loads(holdfast(environment, "status", "--json").stdout)
    assert (row["name"], row["state"], row["step"]) == ("digits/first", "trained", 34)
    assert row["path"] == f"{STORE}/digits/first"
    page = holdfast(environment, "status", "first").stdout
    assert f"to go on: holdfast resume digits/first --store {STORE}" in page
    assert "completed" in holdfast(environment, "logs", "first").stdout + page
    listed = holdfast(environment, "checkpoints", "list", "first", "--json")
    assert [entry["step"] for entry in json.loads(listed.stdout)] == [17, 34]
    verified = holdfast(environment, "checkpoints", "verify", "first")
    assert verified.stdout.count("good") == 2, verified.stderr


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        ("s3://", "names no bucket"),
        ("s3://no-such-bucket/x", "there is no bucket 'no-such-bucket' here"),
        ("s3://me:hunter2@runs/x", "a user or a password"),
        ("s3://runs/x?token=hunter2", "a query"),
        ("ftp://runs/x", "begins with ftp://"),
    ],
)
@pytest.mark.parametrize("command", [("run", "digits", "--run-id", "x"), ("status",)])
def test_a_wrong_address_is_one_line(
    command: tuple[str, ...], store: str, expected: str, environment: dict[str, str]
) -> None:
    ended = holdfast(environment, *command, store=store)
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert expected in line
    assert "hunter2" not in line


def test_a_missing_extra_is_named_with_its_command(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "obstore").mkdir()
    missing = "raise ModuleNotFoundError('No module named obstore', name='obstore')"
    (tmp_path / "obstore" / "__init__.py").write_text(missing)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    ended = holdfast({**environment, "PYTHONPATH": path}, "status")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "pip install 'holdfast[bucket]'" in ended.stderr


CLOCK = """
import os, time
right_s = time.time
time.time = lambda: right_s() + float(os.environ["CLOCK_OFF_S"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("off_s", [0, 7200])
def test_the_doctor_compares_the_clock_with_that_of_the_bucket(
    off_s: int, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    own = {"CLOCK_OFF_S": str(off_s), "PYTHONPATH": path, "PREFECT_HOME": str(tmp_path / "p")}
    done = holdfast({**environment, **own}, "doctor", "--json")
    found = {one["subject"]: one for one in json.loads(done.stdout)}
    assert found["bucket"]["verdict"] in ("good", "warning"), found["bucket"]
    assert found["bucket's clock"]["verdict"] == ("warning" if off_s else "good")
    if off_s:
        seconds = int(found["bucket's clock"]["detail"].split()[5])
        assert seconds == pytest.approx(off_s, abs=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_is_resumed_elsewhere_published_and_pulled(
    environment: dict[str, str], tmp_path: Path
) -> None:
    options = [word for override in QUICK for word in ("--set", override)]
    killed = holdfast(
        {
            **environment,
            "HOLDFAST_FAULT_POINT": "store.after-swap:2",
            "HOLDFAST_SCRATCH": str(tmp_path / "gone"),
        },
        "run", "digits", "--run-id", "second", *options,
    )  # fmt: skip
    assert killed.returncode in (1, -signal.SIGKILL), killed.stderr
    elsewhere = {**environment, "HOLDFAST_HOST": "elsewhere"}
    resumed = holdfast(elsewhere, "resume", "second")
    assert resumed.returncode == 0, resumed.stderr
    assert "digits@1" in holdfast(environment, "bundles").stdout.replace("digits@1 ", "digits@1")
    there = {**environment, "HOLDFAST_SCRATCH": str(tmp_path / "reader")}
    read = holdfast(there, "report", "second", "--read")
    assert Path(read.stdout.strip()).read_text().startswith("<!doctype html>"), read.stderr
    files = [path for path in (tmp_path / "reader").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".safetensors"]
    scored = holdfast(there, "evaluate", "second", "--json")
    assert json.loads(scored.stdout)["step"] == 34, scored.stderr
    tensors = (tmp_path / "reader").rglob("*.safetensors")
    assert {path.parent.name for path in tensors} == {"step-00000034"}
    target = tmp_path / "model"
    pulled = holdfast(environment, "pull", "digits@1", "--to", str(target))
    assert pulled.returncode == 0, pulled.stderr
    alone = subprocess.run(
        [sys.executable, "-P", str(target / "verify.py")], capture_output=True, check=False
    )
    assert alone.returncode == 0
    for folder in (tmp_path, Path(environment["HOLDFAST_SCRATCH"])):
        for path in folder.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_pruning_says_what_it_would_do_and_keeps_what_is_young(environment: dict[str, str]) -> None:
    code = "from holdfast.flows.command_line.entry_point import main; main()"

    def prune(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", code, "prune", *arguments]
        return subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )

    done = prune(STORE, "--keep-last", "2", "--older-than", "30d", "--dry-run", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["gone"], told["failed"]) == (0, [], {})
    assert told["kept"]["digits/first"] == "among the 2 newest of digits"
    wrong = prune(STORE, "--keep-last", "1", "--older-than", "soon")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "as in 30d" in wrong.stderr
