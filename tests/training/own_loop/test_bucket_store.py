"""A script with its own loop, whose store is a bucket; the server is moto."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.training.exactness.trial import Trial
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.tiers.scratch import tier_folder
from holdfast.training.tiers.viewing import refresh_view
from holdfast.training.upkeep.copying import copy_run
from tests.contracts.fault_proxy import hurt_way
from tests.contracts.object_servers import SECRET, make_bucket, moto
from tests.flows.prefect_server import wait_until

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
pytest.importorskip("moto", reason="moto is not installed")
pytestmark = pytest.mark.slow
ADDRESS = Address("s3", "runs", "own")
SCRIPT = """
import sys
import torch, holdfast
often = {"checkpoint.every_steps": 5, "distributed.strategy": "ddp"}
run = holdfast.run("toy", "one", store="s3://runs/own", seed=1, settings=often)
model = run.parallel(torch.nn.Linear(60, 60))
optimizer = torch.optim.AdamW(model.parameters())
run.keep(model=model, optimizer=optimizer)
for step in run.steps(20):
    optimizer.zero_grad()
    model(torch.randn(8, 60)).square().mean().backward()
    optimizer.step()
if run.rank == 0:
    torch.save(model.state_dict(), sys.argv[1])
"""


SEVERAL = '["distributed.num_processes=3"]'


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with moto() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        make_bucket(environment, ADDRESS.bucket)
        monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "watcher"))
        path = tmp_path / "train.py"
        path.write_text(SCRIPT)
        yield path


def weights_of(folder: Path, scratch: str) -> Path:
    """The file's name stands in the file."""
    return folder / f"weights-of-{scratch}" / "weights.pt"


def begin(
    script: Path, scratch: str, trial: Trial | None = None, **environment: str
) -> subprocess.Popen[bytes]:
    folder = script.parent
    weights_of(folder, scratch).parent.mkdir()
    told = {**os.environ, **environment, "HOLDFAST_SCRATCH": str(folder / scratch)}
    told |= trial.environment() if trial is not None else {}
    command = [sys.executable, "-P", str(script), str(weights_of(folder, scratch))]
    return subprocess.Popen(command, env=told)


def start(script: Path, scratch: str, trial: Trial | None = None, **environment: str) -> int:
    return begin(script, scratch, trial, **environment).wait()


@pytest.mark.parametrize("settings", ["[]", SEVERAL], ids=["one process", "several"])
def test_it_goes_on_on_machines_that_share_nothing_and_ends_with_the_same_bytes(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str
) -> None:
    monkeypatch.setenv("HOLDFAST_SETTINGS", settings)
    assert start(script, "first", Trial(stop_at=7, stop_signal="SIGTERM")) == 75
    killed = start(script, "second", Trial(stop_at=13, stop_signal="SIGKILL"))
    assert killed == -signal.SIGKILL
    assert start(script, "third") == 0
    assert start(script, "calm", HOLDFAST_STORE=str(tmp_path / "store")) == 0
    ends = [weights_of(tmp_path, name).read_bytes() for name in ("third", "calm")]
    assert ends[0] == ends[1]
    run = RunDirectory(refresh_view(ADDRESS) / "toy" / "one")
    first, second, third = read_segments(run)
    assert first.outcome == "preempted"
    assert first.end_step == 7 or (settings == SEVERAL and first.end_step == 8)
    assert (second.outcome, second.start_step) == ("running", first.end_step)
    assert (third.outcome, third.end_step) == ("completed", 20)
    assert third.start_step in (
        first.end_step,
        10,
    )  # what was being written was lost with the machine
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_notice_ends_the_wait_for_an_older_checkpoint_and_nothing_is_lost(
    script: Path, tmp_path: Path
) -> None:
    """The newest one is damaged, and the one before does not come."""
    begun = RunDirectory(tmp_path / "begun" / "toy" / "one")
    stopped = Trial(stop_at=13, stop_signal="SIGTERM")
    assert start(script, "first", stopped, HOLDFAST_STORE=str(tmp_path / "begun")) == 75
    with (begun.checkpoint(13) / "model.safetensors").open("r+b") as file:
        file.write(b"damaged")
    copy_run(begun, tier_folder(ADDRESS, "work"))
    with hurt_way(os.environ) as (proxy, environment):
        proxy.hurt(only=r"^GET .*step-00000010", for_ever="hang")
        waiting = begin(script, "second", **environment)
        try:
            second = tmp_path / "second"
            wait_until(lambda: [*second.rglob("*.damaged-1")], 60.0, "the damaged one set aside")
            waiting.send_signal(signal.SIGTERM)
            assert waiting.wait(30.0) == 75
        finally:
            waiting.kill()
            waiting.wait()
    assert start(script, "third") == 0
    assert start(script, "calm", HOLDFAST_STORE=str(tmp_path / "store")) == 0
    ends = [weights_of(tmp_path, name).read_bytes() for name in ("third", "calm")]
    assert ends[0] == ends[1]
    records = read_segments(RunDirectory(refresh_view(ADDRESS) / "toy" / "one"))
    assert [record.start_step for record in records] == [0, 10]


def test_a_bucket_that_is_not_there_is_one_line(script: Path) -> None:
    told = {**os.environ, "HOLDFAST_STORE": "s3://no-such-bucket/x"}
    command = [sys.executable, "-P", str(script), "x"]
    ended = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "there is no bucket 'no-such-bucket' here" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
