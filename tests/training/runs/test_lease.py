from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.training.errors import LeaseHeldError, LeaseLostError, StorageError
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.runs.lease import Lease, read_lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.process_identity import current_process

TTL_S = 30.0


OTHER_MACHINE = replace(current_process(), host="other", boot_id="another boot")


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "digits" / "run-1")


def make_overdue(run: RunDirectory, generation: int, age_s: float = 1000.0) -> None:
    moment_s = time.time() - age_s
    os.utime(run.lease / f"{generation:08d}.json", (moment_s, moment_s))


def test_a_run_without_a_lease_can_be_taken_and_released(run: RunDirectory) -> None:
    assert read_lease(run) is None
    with Lease.acquire(run, TTL_S) as lease:
        lease.check()
        view = read_lease(run)
        assert view is not None
        assert (view.generation, view.status, view.is_expired) == (1, "held", False)
        assert view.process == current_process()
        assert 0 <= view.age_s < 5
        assert lease.staging.is_dir()
    after = read_lease(run)
    assert after is not None
    assert after.status == "released"
    assert not lease.staging.exists()
    with pytest.raises(LeaseLostError, match="released"):
        lease.check()


def test_the_second_is_refused_and_told_who_since_when_and_until_when(run: RunDirectory) -> None:
    with (
        Lease.acquire(run, TTL_S),
        pytest.raises(LeaseHeldError, match=rf"process {os.getpid()} on .* since .* ends at"),
    ):
        Lease.acquire(run, TTL_S)


def test_a_refused_contender_leaves_nothing_behind(run: RunDirectory) -> None:
    with Lease.acquire(run, TTL_S) as lease:
        with pytest.raises(LeaseHeldError):
            Lease.acquire(run, TTL_S)
        assert names(run.staging) == [lease.staging.name]
        assert names(run.lease) == ["00000001.json"]


def test_a_release_lets_the_next_begin_at_once_with_the_next_generation(run: RunDirectory) -> None:
    for generation in (1, 2, 3):
        lease = Lease.acquire(run, TTL_S)
        assert lease.generation == generation
        lease.release()
        lease.release()
    assert len(names(run.lease)) == 3


def test_a_used_again_process_id_is_not_the_holder(run: RunDirectory) -> None:
    former = replace(current_process(), pid_start=1)
    with Lease.acquire(run, 3600.0, identity=former):
        Lease.acquire(run, TTL_S).release()


def test_the_lease_is_renewed_while_it_is_held(run: RunDirectory) -> None:
    with Lease.acquire(run, 1.0):
        time.sleep(1.5)
        view = read_lease(run, OTHER_MACHINE)
        assert view is not None
        assert view.status == "held"
        with pytest.raises(LeaseHeldError):
            Lease.acquire(run, TTL_S, identity=OTHER_MACHINE)


def test_the_loser_of_a_takeover_is_told_who_has_it(run: RunDirectory) -> None:
    first = Lease.acquire(run, TTL_S)
    make_overdue(run, 1)
    with Lease.acquire(run, TTL_S, identity=OTHER_MACHINE):
        with pytest.raises(LeaseLostError, match=rf"process {os.getpid()} on other took over"):
            first.check()
        first.release()
        view = read_lease(run, OTHER_MACHINE)
        assert view is not None
        assert (view.generation, view.status) == (2, "held")


def test_a_contender_that_stalls_before_its_claim_does_not_win_later(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was about to take generation 1 when another took, used and released it."""
    link = os.link

    def link_late(source: Path, target: Path) -> None:
        monkeypatch.undo()
        Lease.acquire(run, TTL_S).release()
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    with pytest.raises(LeaseHeldError):
        Lease.acquire(run, TTL_S)
    Lease.acquire(run, TTL_S).release()
    assert names(run.staging) == []


def test_a_contender_whose_staging_folder_is_taken_while_it_writes_there_is_refused(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_content = Lease._write_content
    winners: list[Lease] = []

    def overtaken(lease: Lease, released_at: float | None) -> None:
        monkeypatch.setattr(Lease, "_write_content", write_content)
        winners.append(Lease.acquire(run, TTL_S, identity=OTHER_MACHINE))
        write_content(lease, released_at)

    monkeypatch.setattr(Lease, "_write_content", overtaken)
    with pytest.raises(LeaseHeldError, match="on other"):
        Lease.acquire(run, TTL_S)
    with winners[0] as winner:
        winner.check()
        assert names(run.staging) == [winner.staging.name]


def test_a_winner_that_stalls_before_it_fences_gives_way_to_the_next(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fence = Lease._fence_others
    successors: list[Lease] = []

    def fence_late(lease: Lease) -> None:
        monkeypatch.undo()
        make_overdue(run, 1)
        successors.append(Lease.acquire(run, TTL_S))
        fence(lease)

    monkeypatch.setattr(Lease, "_fence_others", fence_late)
    with pytest.raises((LeaseLostError, StorageError)):
        Lease.acquire(run, TTL_S)
    successors[0].check()
    assert names(run.staging) == [successors[0].staging.name]
    successors[0].release()


def test_a_link_whose_answer_was_lost_counts_as_won(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    with Lease.acquire(run, TTL_S) as lease:
        lease.check()


def test_a_file_system_without_hard_links_is_named_as_the_cause(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="hard links"):
        Lease.acquire(run, TTL_S)
    assert names(run.staging) == []


def test_a_store_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(StorageError, match=r"cannot list .*Not a directory"):
        Lease.acquire(RunDirectory(tmp_path / "store" / "run"), TTL_S)


def failing_renewal(*arguments: object, **options: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_renewals_that_fail_for_longer_than_the_ttl_end_the_lease(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.acquire(run, 0.4)
    monkeypatch.setattr(os, "utime", failing_renewal)
    lease.check()
    time.sleep(0.9)
    with pytest.raises(LeaseLostError, match=r"could not be renewed.*Input/output error"):
        lease.check()
    monkeypatch.undo()
    lease.release()


def test_one_failed_renewal_is_forgiven(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease.acquire(run, 1.0) as lease:
        monkeypatch.setattr(os, "utime", failing_renewal)
        time.sleep(0.4)
        monkeypatch.undo()
        time.sleep(1.0)
        lease.check()
        assert read_lease(run).status == "held"  # type: ignore[union-attr]


def test_a_renewal_needs_no_disk_space_and_no_new_file(run: RunDirectory) -> None:
    with Lease.acquire(run, 0.2):
        path = run.lease / "00000001.json"
        inode, content = path.stat().st_ino, path.read_bytes()
        first_s = path.stat().st_mtime
        for _ in range(1000):
            if path.stat().st_mtime > first_s:
                break
            time.sleep(0.01)
        assert path.stat().st_mtime > first_s
        assert (path.stat().st_ino, path.read_bytes()) == (inode, content)


def test_a_deleted_lease_is_noticed(run: RunDirectory) -> None:
    lease = Lease.acquire(run, TTL_S)
    (run.lease / "00000001.json").unlink()
    with pytest.raises(LeaseLostError, match="was deleted"):
        lease.check()
    lease.release()
    assert names(run.lease) == [] or read_lease(run).is_expired  # type: ignore[union-attr]


def test_a_disk_error_in_a_check_is_not_taken_for_a_lost_lease(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease.acquire(run, TTL_S) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "lstat", failing_renewal)
            with pytest.raises(StorageError, match="check the lease"):
                lease.check()
        lease.check()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"pid": "many"}'])
def test_an_unreadable_lease_counts_as_held_for_a_minute(run: RunDirectory, content: bytes) -> None:
    run.lease.mkdir(parents=True)
    (run.lease / "00000004.json").write_bytes(content)
    with pytest.raises(LeaseHeldError, match=r"process 0 on \?"):
        Lease.acquire(run, TTL_S)
    make_overdue(run, 4, 61.0)
    with Lease.acquire(run, TTL_S) as lease:
        assert lease.generation == 5


def test_other_files_in_the_lease_folder_are_no_leases(run: RunDirectory) -> None:
    run.lease.mkdir(parents=True)
    for name in ("notes.txt", ".00000009.json.tmp", "9.json"):
        (run.lease / name).write_text("{}")
    with Lease.acquire(run, TTL_S) as lease:
        assert lease.generation == 1


def test_a_living_holder_whose_clock_is_fast_keeps_its_lease(run: RunDirectory) -> None:
    first = Lease.acquire(run, 1.0, identity=OTHER_MACHINE)
    make_overdue(run, 1, age_s=-3600.0)
    with pytest.raises(LeaseHeldError):
        Lease.acquire(run, TTL_S)
    first.check()
    first.release()


def test_the_lease_file_says_who_holds_it(run: RunDirectory) -> None:
    with Lease.acquire(run, TTL_S) as lease:
        content = json.loads((run.lease / "00000001.json").read_text())
    assert content["pid"] == os.getpid()
    assert content["token"] == lease.token
    assert content["ttl_s"] == TTL_S
    assert content["released_at"] is None


def test_left_overs_of_contenders_that_died_are_cleaned_up(run: RunDirectory) -> None:
    token = "0123456789abcdef"
    for name in (f"00000001-{token}", f"fenced-00000000-{token}-{token}"):
        (run.staging / name).mkdir(parents=True)
        write_json_durably(run.staging / name / "x.json", 1)
    with Lease.acquire(run, TTL_S) as lease:
        assert names(run.staging) == [lease.staging.name]


def test_a_contender_for_a_later_generation_is_left_alone(run: RunDirectory) -> None:
    later = run.staging / "00000007-token"
    later.mkdir(parents=True)
    with Lease.acquire(run, TTL_S):
        assert later.is_dir()


def test_reading_a_lease_imports_no_heavy_module() -> None:
    program = (
        "import holdfast.training.runs.lease, sys; "
        "sys.exit(bool({'torch', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
