"""A run whose bucket, network, credentials or disk fail: training goes on, and nothing is lost.

What does not pass is one line at the end, and once its cause is gone the run is resumed: on this
machine, and on one that has nothing of it, with the bytes of a run in a folder.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from holdfast.tasks.attempts import newest_step
from holdfast.training.errors import DataFormatError, InputError, StorageError
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.probe import require_fit
from holdfast.training.tiers.head import HeadLease
from holdfast.training.tiers.keeping import kept_up, opened_replica
from holdfast.training.tiers.scratch import run_name, tier_folder
from holdfast.training.tiers.viewing import refresh_view
from tests.contracts.credential_server import SECRET as CLOUDS_SECRET
from tests.contracts.credential_server import credential_server
from tests.contracts.fault_proxy import Fault, FaultProxy, hurt_bucket
from tests.contracts.object_servers import SECRET, moto
from tests.faults.campaign import Training, complete, differences, final_state
from tests.generality.harness import OFTEN, stop_after

bucket = pytest.importorskip("holdfast.training.storage.bucket", reason="no extra 'bucket'")
pytest.importorskip("moto", reason="moto is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ADDRESS = Address("s3", "runs", "faults")
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    training = Training(tmp_path_factory.mktemp("calm"), "calm", overrides=OFTEN)
    complete(training)
    return training.run


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The way to a bucket; what never passes is given up soon, and dead holders are, too."""
    with moto() as server, hurt_bucket(server, ADDRESS.bucket, monkeypatch) as proxy:
        for name, seconds in (("SMALL_TIMEOUT_S", 1.5), ("BULK_TIMEOUT_S", 3.0)):
            monkeypatch.setattr(bucket, name, seconds)
        for name in ("RETRY_S", "RETRY_BULK_S"):
            monkeypatch.setattr(bucket, name, 2.0)
        monkeypatch.setattr(bucket, "MAX_RETRIES", 3)
        acquired = partial(HeadLease.acquire, ttl_s=1.0)
        monkeypatch.setattr(HeadLease, "acquire", staticmethod(acquired))
        monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "first"))
        yield proxy


def here() -> Training:
    return Training(tier_folder(ADDRESS, "work"), "one", overrides=OFTEN)


def wait_for_step(training: Training, step: int) -> None:
    """Until the bucket has it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while newest_step(RunDirectory(refresh_view(ADDRESS) / run_name(training.run))) < step:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def assert_whole_elsewhere(
    calm: RunDirectory, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that has nothing of the run finds all of it, and no file holds the secret."""
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(folder / "elsewhere"))
    there = here()
    with opened_replica(there.run):
        assert differences(final_state(calm), final_state(there.run)) == []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(one.encode() in content for one in (SECRET, CLOUDS_SECRET)), path


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("reset", "does not answer in time"),
        ("hang", "does not answer in time"),
        ("500", "the server answers 500"),
        ("503", "the server answers 503"),
        ("429", "the server answers 429"),
        ("ExpiredToken", "the credentials have expired"),
        ("RequestTimeTooSkewed", "this machine's clock is wrong"),
        ("AccessDenied", "the server does not allow it"),
        ("NoSuchBucket", "there is no bucket 'runs' here"),
    ],
)
def test_what_does_not_pass_hinders_no_step_is_one_line_and_is_made_up_for(
    fault: Fault,
    expected: str,
    way: FaultProxy,
    calm: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    training = here()

    def train() -> None:
        with (
            opened_replica(training.run, tell=told.append) as replica,
            kept_up(replica, patience_s=0.5),
        ):
            stop_after(training, signal.SIGTERM, 7)
            wait_for_step(training, 7)
            way.hurt(for_ever=fault)
            complete(training)

    with pytest.raises(StorageError, match="It is whole on this machine") as failed:
        train()
    assert expected in str(failed.value)
    assert "\n" not in str(failed.value)
    assert failed.value.exit_code == 1
    assert len([line for line in told if "the store is behind" in line]) <= 1
    assert "hunter2" not in "".join([str(failed.value), *told])
    way.hurt()
    assert differences(final_state(calm), final_state(training.run)) == []
    with opened_replica(training.run) as replica, kept_up(replica):
        pass
    assert_whole_elsewhere(calm, tmp_path, monkeypatch)


@pytest.mark.parametrize("seed", range(3))
def test_what_passes_is_not_even_noticed(
    seed: int,
    way: FaultProxy,
    calm: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A third of all requests go wrong somehow, on a run that is stopped and goes on elsewhere."""
    rng = random.Random(seed)
    faults: list[Fault] = ["500", "503", "429", "reset", "503 after", "reset after", "cut body"]
    faults += ["flipped bit", "NoSuchKey"]
    num_hurt = 0
    for number in range(2):
        monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / f"machine-{number}"))
        training = here()
        way.hurt()
        require_fit(open_store(ADDRESS), "the store")
        way.hurt(*(rng.choice(["none", "none", rng.choice(faults)]) for _ in range(3000)))  # type: ignore[arg-type]
        deadline_s = time.monotonic() + PATIENCE_S
        while not _lived(training, is_killed=number == 0):
            assert time.monotonic() < deadline_s
        num_hurt += way.num_hurt
    assert num_hurt > 5
    way.hurt()
    assert_whole_elsewhere(calm, tmp_path, monkeypatch)


def _lived(training: Training, *, is_killed: bool) -> bool:
    """Train in the bucket; False where what its folder is made of cannot be read right now."""
    is_opened = False
    try:
        with opened_replica(training.run) as replica, kept_up(replica, patience_s=PATIENCE_S):
            is_opened = True
            if is_killed:
                stop_after(training, signal.SIGKILL, 7)
            else:
                complete(training)
    except (StorageError, DataFormatError, InputError):  # the mark of a fit server was not found
        assert not is_opened
    return is_opened


@pytest.mark.parametrize("kind", ["pod", "profile"])
def test_credentials_that_end_in_the_middle_of_a_run_are_renewed(
    kind: str,
    way: FaultProxy,
    calm: RunDirectory,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pod's by the cloud, those of a file by whoever writes new ones into it."""
    home, told, training = tmp_path_factory.mktemp("home"), list[str](), here()
    monkeypatch.setenv("HOME", str(home))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (home / ".aws").mkdir()

    def renew(key: str) -> None:
        text = f"[default]\naws_access_key_id={key}\naws_secret_access_key={CLOUDS_SECRET}\n"
        (home / ".aws" / "credentials").write_text(text)

    with credential_server() as server:
        if kind == "pod":
            (home / "token").write_text("a-token-of-the-pod")
            monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{server.url}/pod")
            token = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
            monkeypatch.setenv(token, str(home / "token"))
            monkeypatch.setattr(way, "is_valid", server.is_valid)
        else:
            renew("FIRST")
            monkeypatch.setattr(way, "is_valid", lambda key: key == "FIRST")
        with opened_replica(training.run, tell=told.append) as replica, kept_up(replica):
            stop_after(training, signal.SIGTERM, 7)
            wait_for_step(training, 7)
            if kind == "profile":
                monkeypatch.setattr(way, "is_valid", lambda key: key == "SECOND")
            stop_after(training, signal.SIGKILL, 20)
            time.sleep(1.0)
            if kind == "profile":
                renew("SECOND")
            complete(training)
        assert_whole_elsewhere(calm, tmp_path, monkeypatch)
        assert kind == "profile" or len(server.asked) >= 3
    behind = [line for line in told if "the credentials have expired" in line]
    assert len(behind) == (1 if kind == "profile" else 0), told


def test_without_the_right_to_delete_a_run_ends_well_and_that_is_said_once(
    way: FaultProxy, calm: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    training = here()
    way.hurt(for_ever="AccessDenied", only=r"\?delete")
    with opened_replica(training.run, tell=told.append) as replica, kept_up(replica):
        assert replica is not None
        stop_after(training, signal.SIGTERM, 7)
        wait_for_step(training, 7)
        complete(training)
    assert len([line for line in told if "old objects stay in the store" in line]) == 1
    assert way.num_hurt >= 1
    way.hurt()
    assert_whole_elsewhere(calm, tmp_path, monkeypatch)


@pytest.mark.parametrize("what", ["all of it", "its checkpoints"])
def test_a_scratch_disk_that_is_wiped_takes_nothing_from_the_bucket(
    what: str,
    way: FaultProxy,
    calm: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = here()
    lost = training.run.path if what == "all of it" else training.run.checkpoints

    def train() -> None:
        with (
            opened_replica(training.run) as replica,
            kept_up(replica, patience_s=1.0),
        ):
            stop_after(training, signal.SIGTERM, 7)
            wait_for_step(training, 7)
            shutil.rmtree(lost)
            time.sleep(1.5)

    if what == "all of it":
        train()
    else:
        with pytest.raises(StorageError, match="has lost its checkpoints"):
            train()
    with opened_replica(training.run) as replica, kept_up(replica):
        assert newest_step(training.run) == 7
        complete(training)
    assert_whole_elsewhere(calm, tmp_path, monkeypatch)
