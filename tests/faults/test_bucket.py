"""A run in a bucket, killed, and continued on a machine that has nothing of it: the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from holdfast.tasks.attempts import newest_step
from holdfast.tasks.run_summary import summarize
from holdfast.training.errors import InputError
from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.exactness.trial import Trial
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.lease import read_lease
from holdfast.training.storage.address import Address
from holdfast.training.storage.protocol import PART_BYTES
from holdfast.training.storage.unfinished import UnfinishedUploads
from holdfast.training.tiers.head import HEAD_TTL_S
from holdfast.training.tiers.keeping import kept_up, opened_replica
from holdfast.training.tiers.late_files import _mark
from holdfast.training.tiers.scratch import tier_folder
from holdfast.training.tiers.viewing import ALL, refresh_view
from holdfast.training.upkeep import bucket_shelf
from holdfast.training.upkeep.bucket_shelf import BucketShelf
from holdfast.training.upkeep.copying import copy_run
from tests.contracts.object_servers import KEY, SECRET, make_bucket, moto, seaweedfs
from tests.contracts.test_object_stores import require_program
from tests.faults.campaign import Training, complete, differences, final_state
from tests.flows.prefect_server import wait_until
from tests.generality.harness import OFTEN, stop_after

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
pytest.importorskip("moto", reason="moto is not installed")
ADDRESS = Address("s3", "runs", "team")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A bucket; the scratch folder is this machine's, and a test may take another."""
    with moto() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        make_bucket(environment, ADDRESS.bucket)
        monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "first"))
        yield monkeypatch


def test_a_run_goes_on_on_a_machine_that_has_nothing_of_it(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm = Training(tmp_path / "calm", "one", overrides=OFTEN)
    complete(calm)
    for name, number, step in (
        ("first", signal.SIGKILL, 7),
        ("second", signal.SIGTERM, 12),
        ("third", signal.SIGKILL, 16),
    ):
        machine.setenv("HOLDFAST_SCRATCH", str(tmp_path / name))
        killed = Training(tier_folder(ADDRESS, "work"), "one", overrides=OFTEN)
        with opened_replica(killed.run) as replica, kept_up(replica):
            stop_after(killed, number, step)
    machine.setenv("HOLDFAST_SCRATCH", str(tmp_path / "last"))
    last = Training(tier_folder(ADDRESS, "work"), "one", overrides=OFTEN)
    with opened_replica(last.run) as replica, kept_up(replica):
        complete(last)
    assert differences(final_state(calm.run), final_state(last.run)) == []
    root = refresh_view(ADDRESS)
    records = sorted((root / last.run.path.relative_to(tier_folder(ADDRESS, "work"))).rglob("*"))
    assert any(path.name == "0004.json" for path in records)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert SECRET.encode() not in content, path
            assert KEY.encode() not in content, path


@pytest.mark.slow
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_waited_for(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm = Training(tmp_path / "calm", "one", overrides=OFTEN)
    complete(calm)
    killed = Training(tier_folder(ADDRESS, "work"), "one", overrides=OFTEN)
    with opened_replica(killed.run) as replica, kept_up(replica):
        stop_after(killed, signal.SIGTERM, 12)
    machine.setenv("HOLDFAST_SCRATCH", str(tmp_path / "second"))
    second = Training(tier_folder(ADDRESS, "work"), "one", overrides=OFTEN)
    with opened_replica(second.run, can_begin_early=True) as replica:
        assert replica is not None
        *older, newest = sorted(second.run.checkpoints.iterdir())
        assert [path.name for path in older[-1].iterdir()] == ["manifest.json"]
        with (newest / "model.safetensors").open("r+b") as file:
            file.write(b"damaged")
        _mark(second.run).touch()  # they are late, and begin to come only now
        threading.Timer(4.0, replica.start).start()
        complete(second)
        replica.finish(60.0)
    assert (newest.parent / f"{newest.name}.damaged-1").is_dir()
    assert differences(final_state(calm.run), final_state(second.run)) == []
    records = read_segments(second.run)
    assert records[1].start_step == int(older[-1].name.removeprefix("step-")) < 12


@pytest.mark.slow
def test_a_stage_by_itself_trains_in_a_bucket_and_answers_a_notice(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = python_command("holdfast.training", "segment", "--experiment", "digits")
    command += ["--store", str(ADDRESS), "--run-id", "alone", "--set", "train.num_epochs=2"]
    stopped = {**child_environment(1), "HOLDFAST_SCRATCH": str(tmp_path / "gone")}
    stopped |= Trial(stop_at=20, stop_signal="SIGTERM").environment()
    assert subprocess.run(command, env=stopped, check=False).returncode == 75
    seen = RunDirectory(refresh_view(ADDRESS) / "digits" / "alone")
    assert newest_step(seen) == 20
    assert subprocess.run(command, env=child_environment(1), check=False).returncode == 0
    run = RunDirectory(refresh_view(ADDRESS) / "digits" / "alone")
    assert [(r.outcome, r.end_step) for r in read_segments(run)] == [
        ("preempted", 20),
        ("completed", 34),
    ]


@pytest.mark.slow
def test_a_copied_run_ends_with_the_same_bytes(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a folder to a bucket, on there on another machine, and back to a folder."""
    calm = Training(tmp_path / "calm", "one", overrides=OFTEN)
    complete(calm)
    begun = Training(tmp_path / "begun", "one", overrides=OFTEN)
    stop_after(begun, signal.SIGKILL, 7)
    copy_run(begun.run, tier_folder(ADDRESS, "work"))
    machine.setenv("HOLDFAST_SCRATCH", str(tmp_path / "second"))
    there = Training(tier_folder(ADDRESS, "work"), "one", overrides=OFTEN)
    with opened_replica(there.run) as replica, kept_up(replica):
        stop_after(there, signal.SIGTERM, 12)
    machine.setenv("HOLDFAST_SCRATCH", str(tmp_path / "third"))
    copy_run(Training(tier_folder(ADDRESS, "work"), "one").run, tmp_path / "last")
    last = Training(tmp_path / "last", "one", overrides=OFTEN)
    complete(last)
    assert differences(final_state(calm.run), final_state(last.run)) == []
    assert len(read_segments(last.run)) == 3


CLOCK = """
import os, time
right_s = time.time
time.time = lambda: right_s() + float(os.environ["CLOCK_OFF_S"])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_machines_whose_clocks_are_two_hours_apart_share_a_run(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who lives keeps it, who is dead loses it within a lease, and the bytes are the same."""
    calm = Training(tmp_path / "calm", "clocks", "digits", overrides=OFTEN)
    complete(calm)
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(CLOCK)
    command = python_command("holdfast.training", "segment", "--experiment", "digits")
    command += ["--store", str(ADDRESS), "--run-id", "clocks", "--progress", "none"]
    command += [word for override in OFTEN for word in ("--set", override)]

    def of_machine(name: str, off_s: float) -> dict[str, str]:
        path = os.pathsep.join([str(tmp_path / "clock"), os.environ["PYTHONPATH"]])
        own = {"HOLDFAST_HOST": name, "HOLDFAST_SCRATCH": str(tmp_path / name)}
        return {**child_environment(1), **own, "PYTHONPATH": path, "CLOCK_OFF_S": str(off_s)}

    sleeping = Trial(stop_at=60, stop_signal="SIGSTOP").environment()
    fast, slow = of_machine("fast", 3600.0), of_machine("slow", -3600.0)
    first = subprocess.Popen(command, env={**fast, **sleeping}, start_new_session=True)
    try:
        wait_until(lambda: newest_step(seen("clocks")) >= 3, 240.0, "steps in the bucket")
        assert summarize(seen("clocks")).state == "training"
        refused = subprocess.run(command, env=slow, capture_output=True, text=True, check=False)
        assert "which renews its lease" in refused.stderr
    finally:
        first.kill()
        code = first.wait()
    assert code == -signal.SIGKILL
    assert subprocess.run(command, env=slow, check=False, timeout=300).returncode == 0
    last = RunDirectory(refresh_view(ADDRESS, "clocks", also=(ALL,)) / "digits" / "clocks")
    assert differences(final_state(calm.run), final_state(last)) == []
    lease = read_lease(last)
    assert lease is not None
    assert time.time() - lease.acquired_at > 3600.0, "its clock was right"


def of_machine(folder: Path, name: str) -> dict[str, str]:
    return {**child_environment(1), "HOLDFAST_HOST": name, "HOLDFAST_SCRATCH": str(folder / name)}


@pytest.fixture
def long(machine: pytest.MonkeyPatch, tmp_path: Path) -> tuple[list[str], RunDirectory]:
    """A training of ten seconds in the bucket, as one starts it; and the same in a folder, calm."""
    overrides = ("checkpoint.every_s=1", "train.num_epochs=60")
    calm = Training(tmp_path / "calm", "long", "digits", overrides=overrides)
    complete(calm)
    command = python_command("holdfast.training", "segment", "--experiment", "digits")
    command += ["--store", str(ADDRESS), "--run-id", "long", "--progress", "none"]
    return [*command, *(w for o in overrides for w in ("--set", o))], calm.run


def assert_same_in_bucket(calm: RunDirectory) -> None:
    there = RunDirectory(refresh_view(ADDRESS, "long", also=(ALL,)) / "digits" / "long")
    assert differences(final_state(calm), final_state(there)) == []


@pytest.mark.slow
def test_of_two_machines_in_the_same_second_one_trains(
    long: tuple[list[str], RunDirectory], tmp_path: Path
) -> None:
    command, calm = long
    both = [
        subprocess.Popen(command, env=of_machine(tmp_path, name), stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    errors = [process.communicate(timeout=120.0)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    [refused] = [told for told, process in zip(errors, both, strict=True) if process.returncode]
    assert "which renews its lease" in refused.splitlines()[-1]
    assert "Traceback" not in refused
    assert_same_in_bucket(calm)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_sleeps_for_two_leases_learns_that_it_was_replaced(
    long: tuple[list[str], RunDirectory], tmp_path: Path
) -> None:
    command, calm = long
    sleeper = subprocess.Popen(
        command,
        env=of_machine(tmp_path, "sleeper"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    processes = [psutil.Process(sleeper.pid)]
    try:
        wait_until(lambda: newest_step(seen("long")) >= 17, 60.0, "steps in the bucket")
        asleep_s = time.monotonic()
        processes += processes[0].children(recursive=True)
        for process in processes:
            process.suspend()
        other = subprocess.run(command, env=of_machine(tmp_path, "other"), check=False)
        assert other.returncode == 0
        time.sleep(max(0.0, asleep_s + 2 * HEAD_TTL_S - time.monotonic()))
        for process in processes:
            process.resume()
        _, told = sleeper.communicate(timeout=60.0)
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        sleeper.wait()
    assert sleeper.returncode == 1, told
    assert "took over" in told.splitlines()[-1], told
    assert "Traceback" not in told
    assert [one.outcome for one in read_segments(seen("long"))] == ["running", "completed"]
    assert_same_in_bucket(calm)


@pytest.mark.slow
def test_what_trains_does_not_outlive_who_keeps_the_bucket(machine: pytest.MonkeyPatch) -> None:
    command = python_command("holdfast.training", "segment", "--experiment", "digits")
    command += ["--store", str(ADDRESS), "--run-id", "long", "--progress", "none"]
    command += ["--set", "train.num_epochs=1000000"]
    keeper = subprocess.Popen(command, env=child_environment(1), start_new_session=True)
    try:
        wait_until(lambda: newest_step(seen("long")) >= 17, 60.0, "steps in the bucket")
        [training] = psutil.Process(keeper.pid).children()
    finally:
        keeper.kill()
        keeper.wait()
    try:
        run = RunDirectory(tier_folder(ADDRESS, "work") / "digits" / "long")
        wait_until(lambda: read_segments(run)[-1].outcome == "preempted", 30.0, "its end")
    finally:
        with suppress(psutil.NoSuchProcess):
            training.kill()


def seen(run_id: str) -> RunDirectory:
    return RunDirectory(refresh_view(ADDRESS, run_id) / "digits" / run_id)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_who_keeps_a_bucket_is_killed_at_each_point_and_the_bytes_are_the_same() -> None:
    """And no file of any of the machines holds a secret. More of it: ``make chaos-store``."""
    command = python_command("tests.faults.store_chaos", "--kills", "8")
    root = Path(__file__).parents[2]
    told = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run(command, cwd=root, env=told, check=False).returncode == 0


KEPT = """
import sys
from pathlib import Path
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.tiers.keeping import opened_replica
with opened_replica(RunDirectory(Path(sys.argv[1]))) as replica:
    replica.bring_up()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moto", "seaweedfs"])
def test_parts_that_a_killed_upload_left_are_found_and_pruned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3", reason="the extra 'aws' is not installed")
    if name == "seaweedfs":
        require_program("weed")
    (tmp_path / "server").mkdir()
    monkeypatch.setattr(bucket_shelf, "ABANDONED_S", -60.0)
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "first"))
    with moto() if name == "moto" else seaweedfs(tmp_path / "server") as environment:
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        make_bucket(environment, ADDRESS.bucket)
        run = RunDirectory(tier_folder(ADDRESS, "work") / "digits" / "large")
        run.checkpoint(1).mkdir(parents=True)
        run.run_json.write_text("{}")
        with (run.checkpoint(1) / "model.safetensors").open("wb") as file:
            file.truncate(10 * PART_BYTES)  # of which eight are on their way at once
        keep = [sys.executable, "-P", "-c", KEPT, str(run.path)]
        killed = {**os.environ, "HOLDFAST_FAULT_POINT": "store.before-part:10"}
        assert subprocess.run(keep, env=killed, check=False).returncode == -signal.SIGKILL
        [left] = UnfinishedUploads(ADDRESS).list()
        assert left.key.startswith(f"{ADDRESS.prefix}/runs/digits/large/")
        assert left.size_bytes >= PART_BYTES
        assert BucketShelf(ADDRESS).sweep(is_dry_run=True)[1] >= PART_BYTES
        assert len(UnfinishedUploads(ADDRESS).list()) == 1
        shelf = BucketShelf(ADDRESS)
        assert shelf.sweep(is_dry_run=False)[1] >= PART_BYTES
        assert (UnfinishedUploads(ADDRESS).list(), shelf.unseen) == ([], "")
        assert subprocess.run(keep, env=os.environ, check=False).returncode == 0


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_where_parts_cannot_be_looked_for_that_is_said(scheme: str) -> None:
    with pytest.raises(InputError, match="are not looked for"):
        UnfinishedUploads(Address(scheme, "runs"))
