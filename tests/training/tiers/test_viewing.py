"""What is read of a run in a bucket, for whom. The bucket, in memory, remembers what is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.runs.lease import Lease, read_lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.storage.protocol import Object
from holdfast.training.tiers import viewing
from holdfast.training.tiers.transfer import GoneError
from holdfast.training.tiers.viewing import ALL, CHECKPOINTS, Wanted, refresh_view
from tests.contracts.memory_objects import MemoryObjects
from tests.training.tiers.test_replica import LARGE, NAME, checkpoint, new_run, opened, write

ADDRESS = Address("s3", "runs", "team")
ONE = f"{CHECKPOINTS}step-00000020/"


class Remembering(MemoryObjects):
    """Knows the files that were read, by the names that they have in the run."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def get(self, key: str, start: int = 0, end: int | None = None) -> Object | None:
        if key.startswith("runs/"):
            self.read.append("/".join(key.split("/")[5:]))
        return super().get(key, start, end)

    def files_read(self) -> set[str]:
        """Since the last time, without the tree."""
        found, self.read = set(self.read) - {"tree.json"}, []
        return found


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remembering:
    """With a run whose files are all too large to stand in its tree."""
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path / "scratch"))
    store, run = Remembering(), new_run(tmp_path)
    checkpoint(run, 20, LARGE)
    for path in ("run.json", "evaluation.json", "report.html", "logs/a", "segments/0001.json"):
        write(run, path, bytes(LARGE))
    for path in (
        "candidates/best/model.safetensors",
        "bundle/1/model.onnx",
        "bundle/manifest.json",
    ):
        write(run, path, bytes(LARGE))
    with opened(store, run) as replica:
        replica.finish(1.0)
    store.files_read()
    monkeypatch.setattr(viewing, "open_store", lambda _: store)
    return store


LISTED = {"run.json", "evaluation.json", "segments/0001.json", "bundle/manifest.json"}
MODELS = {f"{CHECKPOINTS}step-000000{step}/model.safetensors" for step in (10, 20)}


@pytest.mark.parametrize(
    ("reference", "also", "expected"),
    [
        (None, (), LISTED),
        ("first", (), LISTED | {"logs/a"}),
        (NAME, (ONE,), LISTED | {"logs/a", f"{ONE}model.safetensors"}),
        (NAME, (CHECKPOINTS,), LISTED | {"logs/a"} | MODELS),
        (NAME, ("report.html",), LISTED | {"logs/a", "report.html"}),
        ("other", (), set()),
    ],
)
def test_only_what_is_wanted_is_read(
    reference: str | None, also: tuple[str, ...], expected: set[str], bucket: Remembering
) -> None:
    root = refresh_view(ADDRESS, reference, also=also)
    assert bucket.files_read() == expected
    run = RunDirectory(root / NAME)
    if expected:
        assert {path.name for path in run.checkpoints.iterdir()} >= {"step-00000010"}
        assert viewing.has_report(run)
    assert (root / NAME / "logs" / "a").exists() == ("logs/a" in expected)


def test_what_was_read_is_not_read_again_and_stays_while_the_run_does_not_change(
    bucket: Remembering, tmp_path: Path
) -> None:
    refresh_view(ADDRESS)
    bucket.files_read()
    run = RunDirectory(refresh_view(ADDRESS, NAME, also=(ONE,)) / NAME)
    assert f"{ONE}model.safetensors" in bucket.files_read()
    for also in ((), (ONE,)):
        refresh_view(ADDRESS, NAME, also=also)
        assert bucket.files_read() == set()
    refresh_view(ADDRESS)
    assert (bucket.files_read(), (run.path / f"{ONE}model.safetensors").exists()) == (set(), True)
    refresh_view(ADDRESS, NAME, also=(CHECKPOINTS,))
    assert bucket.files_read() >= MODELS - {f"{ONE}model.safetensors"}
    refresh_view(ADDRESS, NAME, also=(CHECKPOINTS,), is_fresh=True)
    assert bucket.files_read() >= MODELS
    with opened(bucket, RunDirectory(tmp_path / NAME)) as replica:
        write(RunDirectory(tmp_path / NAME), "evaluation.json", b"{}")
        replica.finish(1.0)
    refresh_view(ADDRESS)
    assert (run.path / "evaluation.json").read_bytes() == b"{}"
    assert not (run.path / f"{ONE}model.safetensors").exists()


def test_from_afar_a_lease_lasts_as_long_as_the_head_with_which_it_is_renewed(
    bucket: Remembering, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / NAME)
    with opened(bucket, run) as replica, Lease.acquire(run, 0.1):
        replica.bring_up()
        seen = read_lease(RunDirectory(refresh_view(ADDRESS, NAME) / NAME))
        assert seen is not None
        assert seen.ttl_s == replica.head.head.ttl_s > 0.1
    write(run, "lease/00000002.json", b"[]")  # a stranger's is shown as it is
    with opened(bucket, run) as replica:
        replica.bring_up()
    assert (refresh_view(ADDRESS, NAME) / NAME / "lease" / "00000002.json").read_bytes() == b"[]"


def test_a_run_that_moves_while_it_is_read_is_read_as_it_is_then(
    bucket: Remembering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, get = RunDirectory(tmp_path / NAME), bucket.get
    moves = [b"third", b"second"]

    def overtaken(key: str, *part: int) -> Object | None:
        """What is asked for goes, since its run has moved on."""
        if key.endswith("evaluation.json") and moves:
            monkeypatch.setattr(bucket, "get", get)
            with opened(bucket, run) as replica:
                write(run, "evaluation.json", moves.pop() * LARGE)
                replica.finish(1.0)
            monkeypatch.setattr(bucket, "get", overtaken)
        return get(key, *part)

    monkeypatch.setattr(bucket, "get", overtaken)
    seen = RunDirectory(refresh_view(ADDRESS, NAME) / NAME)
    assert seen.evaluation_json.read_bytes() == b"third" * LARGE
    bucket.delete([entry.key for entry in bucket.list("runs") if "evaluation" in entry.key])
    with pytest.raises(GoneError, match=r"evaluation\.json is gone, though the tree names it"):
        refresh_view(ADDRESS, NAME, is_fresh=True)


def test_a_run_that_is_gone_leaves_nothing_here(bucket: Remembering) -> None:
    root = refresh_view(ADDRESS, NAME, also=(ALL,))
    assert (root / NAME / "report.html").exists()
    bucket.delete([f"heads/{NAME}.json"])
    refresh_view(ADDRESS)
    assert not (root / NAME).exists()


@pytest.mark.parametrize(
    ("known", "wanted", "expected"),
    [
        (Wanted(), Wanted(is_listed=True), True),
        (Wanted(is_listed=True), Wanted(), False),
        (Wanted(is_listed=True, also=(ALL,)), Wanted(also=(ONE,)), True),
        (Wanted(also=(CHECKPOINTS,)), Wanted(also=(ONE,)), True),
        (Wanted(also=(ONE,)), Wanted(also=(CHECKPOINTS,)), False),
        (Wanted(also=(ONE,)), Wanted(is_listed=True, also=(ONE,)), True),
    ],
)
def test_what_is_enough_for_whom(known: Wanted, wanted: Wanted, expected: bool) -> None:
    assert known.covers(wanted) is expected
    assert known.and_also(wanted).covers(wanted)
    assert known.and_also(wanted).covers(known)
