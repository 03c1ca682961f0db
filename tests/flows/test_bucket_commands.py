"""Commands whose store is a bucket, as they are typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
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


def typed(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from holdfast.flows.command_line.entry_point import main; main()"
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def holdfast(
    environment: dict[str, str], *arguments: str, store: str = STORE
) -> subprocess.CompletedProcess[str]:
    return typed(environment, *arguments, "--store", store)


def done(environment: dict[str, str], *arguments: str, store: str = STORE) -> str:
    """What a command printed that ended well."""
    ended = holdfast(environment, *arguments, store=store)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


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
    examined = holdfast({**environment, **own}, "doctor", "--json")
    found = {one["subject"]: one for one in json.loads(examined.stdout)}
    assert found["bucket"]["verdict"] in ("good", "warning"), found["bucket"]
    assert found["bucket's clock"]["verdict"] == ("warning" if off_s else "good")
    if off_s:
        seconds = int(found["bucket's clock"]["detail"].split()[5])
        assert seconds == pytest.approx(off_s, abs=60)


@pytest.fixture(scope="module")
def published(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The run ``second``, killed on one machine, and taken to its bundle on another."""
    gone = tmp_path_factory.mktemp("gone")
    options = [word for override in QUICK for word in ("--set", override)]
    killed = holdfast(
        {
            **environment,
            "HOLDFAST_FAULT_POINT": "store.after-swap:2",
            "HOLDFAST_SCRATCH": str(gone),
        },
        "run", "digits", "--run-id", "second", *options,
    )  # fmt: skip
    assert killed.returncode in (1, -signal.SIGKILL), killed.stderr
    told = done({**environment, "HOLDFAST_HOST": "elsewhere"}, "resume", "second")
    assert told.endswith(f"holdfast report digits/second --read --store {STORE}\n")
    for folder in (gone, Path(environment["HOLDFAST_SCRATCH"])):
        for path in folder.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    return environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_was_killed_is_read_from_anywhere_in_parts(
    published: dict[str, str], tmp_path: Path
) -> None:
    assert "digits@1" in done(published, "bundles")
    there = {**published, "HOLDFAST_SCRATCH": str(tmp_path / "reader")}
    told = f"to read the report: holdfast report digits/second --read --store {STORE}"
    assert done(there, "status", "second").splitlines()[-1] == told
    read = done(there, "report", "second", "--read")
    assert Path(read.strip()).read_text().startswith("<!doctype html>")
    files = [path for path in (tmp_path / "reader").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".safetensors"]
    assert json.loads(done(there, "evaluate", "second", "--json"))["step"] == 34
    tensors = (tmp_path / "reader").rglob("*.safetensors")
    assert {path.parent.name for path in tensors} == {"step-00000034"}
    target = tmp_path / "model"
    done(published, "pull", "digits@1", "--to", str(target))
    alone = subprocess.run(
        [sys.executable, "-P", str(target / "verify.py")], capture_output=True, check=False
    )
    assert alone.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bundle_in_a_bucket_is_promoted_named_proved_and_asked(
    published: dict[str, str], tmp_path: Path
) -> None:
    done(published, "promote", "second")
    assert "@champion" in done(published, "bundles")
    done(published, "alias", "digits@1", "staging", "--reason", "to be looked at")
    assert "to be looked at" in done(published, "bundles", "digits")
    done(published, "verify", "digits@staging")
    proved = typed(published, "verify", f"{STORE}/digits/second/bundle")
    assert proved.returncode == 0, proved.stderr
    numpy.save(tmp_path / "samples.npy", numpy.zeros((3, 1, 8, 8), numpy.float32))
    told = done(published, "predict", "digits@staging", str(tmp_path / "samples.npy"))
    assert len(told.splitlines()) == 4
    unknown = holdfast(published, "verify", "digits@9")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_in_a_bucket_is_forked_and_copied(published: dict[str, str], tmp_path: Path) -> None:
    done(published, "fork", "second", "longer", "--at", "latest", "--set", "train.num_epochs=3")
    done(published, "resume", "longer")
    told = json.loads(done(published, "status", "longer", "--json"))
    assert (told["state"], told["step"]) == ("completed", 51)
    for target in (str(tmp_path / "runs"), "s3://runs/other"):
        done(published, "copy", "second", target)
        [row] = json.loads(done(published, "status", "--json", store=target))
        assert (row["name"], row["state"], row["step"]) == ("digits/second", "completed", 34)
        proved = typed(published, "verify", f"{target}/digits/second/bundle")
        assert proved.returncode == 0, proved.stderr


def test_pruning_says_what_it_would_do_and_keeps_what_is_young(environment: dict[str, str]) -> None:
    policy = ("--keep-last", "9", "--older-than")
    ended = typed(environment, "prune", STORE, *policy, "30d", "--dry-run", "--json")
    told = json.loads(ended.stdout)
    assert (ended.returncode, told["gone"], told["failed"]) == (0, [], {})
    assert told["kept"]["digits/first"] == "among the 9 newest of digits"
    wrong = typed(environment, "prune", STORE, *policy, "soon")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "as in 30d" in wrong.stderr
