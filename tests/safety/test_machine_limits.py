"""What a machine does not give is told in one line, and soon."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.tasks.attempts import newest_step
from holdfast.tasks.preflight import require_prefect_home, require_writable
from holdfast.training.bundles.pull import pull
from holdfast.training.bundles.registry import Registry
from holdfast.training.bundles.sources import FolderSource
from holdfast.training.errors import StorageError, StorageFullError
from holdfast.training.runs.directory import RunDirectory, RunRecord, utc_now, write_run_record_once
from holdfast.training.runs.durable_json import create_json_durably
from tests.safety.hostile import within
from tests.training.bundles.small_bundle import make_bundle
from tests.training.checkpointing.checkpoints import SKIPPED, in_child, on_a_small_disk

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


def record(run_id: str = "first") -> RunRecord:
    return RunRecord(
        run_id=run_id, experiment="digits", config={}, config_digest="x", created_at=utc_now()
    )


def test_a_file_system_without_hard_links_is_named_for_run_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=r"run\.json has no hard links"):
        write_run_record_once(RunDirectory(tmp_path / "digits/first"), record())
    with pytest.raises(StorageError, match=r"000001\.json has no hard links"):
        create_json_durably(tmp_path / "000001.json", 1)


def as_nobody(action: Callable[[], None]) -> None:
    """Run it as a user who owns nothing."""

    def act() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        action()

    assert in_child(act) == 0


def reachable(folder: Path) -> None:
    """pytest's folders are for their owner alone."""
    for path in (folder, *folder.parents):
        if path.owner() == "root" and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)


@needs_root
def test_a_run_of_another_user_is_an_odd_line_and_no_end(tmp_path: Path) -> None:
    reachable(tmp_path)
    for name in ("mine", "theirs"):
        write_run_record_once(RunDirectory(tmp_path / f"digits/{name}"), record(name))
    (tmp_path / "digits/theirs").chmod(0o700)
    (tmp_path / "secret").mkdir(mode=0o700)

    def look() -> None:
        from holdfast.flows.command_line.commands.status import _rows

        rows = {row["name"].partition("/")[2]: row for row in _rows(tmp_path)}
        assert rows["mine"]["state"] == "new"
        assert rows["theirs"]["state"] == "unreadable"
        assert "Permission denied" in rows["theirs"]["error"]
        assert newest_step(RunDirectory(tmp_path / "digits/theirs")) == 0
        with pytest.raises(StorageError, match="is not writable: Permission denied"):
            require_writable(tmp_path / "secret/store")

    as_nobody(look)


@needs_root
def test_a_rescuer_sees_nothing_of_a_store_that_it_may_not_enter(tmp_path: Path) -> None:
    from holdfast.flows.fleet.rescue import _step
    from holdfast.flows.fleet.rescue_watch import Watches, see_engine

    reachable(tmp_path)
    run = RunDirectory(tmp_path / "digits/theirs")
    write_run_record_once(run, record())
    (tmp_path / "digits").chmod(0o700)

    def look() -> None:
        assert _step(run) is None
        assert see_engine(Watches(), run, "flow-run", 1, time.monotonic()) is None

    as_nobody(look)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/below"])
def test_a_rescuer_sees_nothing_of_a_run_that_can_be_none(tmp_path: Path, name: str) -> None:
    from holdfast.flows.fleet.rescue import _step
    from holdfast.flows.fleet.rescue_watch import Watches, see_engine

    (tmp_path / "file").write_text("")
    run = RunDirectory(tmp_path / name)
    assert _step(run) is None
    assert see_engine(Watches(), run, "flow-run", 1, time.monotonic()) is None


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022])
def test_the_registry_and_a_pull_have_the_modes_that_the_umask_leaves(
    tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        registry = Registry(tmp_path / "store")
        registry.publish(make_bundle(tmp_path / "source"))
        registry.move_alias("digits", "champion", 1, reason="x", after=None)
        pull(FolderSource(registry.bundle("digits", 1)), tmp_path / "there")
    finally:
        os.umask(before)
    for path in (*(tmp_path / "store").rglob("*"), tmp_path / "there"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.slow
def test_a_full_dev_shm_is_named_where_loader_processes_need_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SMALL_SHARED_MEMORY)
    command = [sys.executable, "-P", str(program), str(SKIPPED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == SKIPPED:
        pytest.skip("this system does not let us mount a small /dev/shm")
    assert done.stdout.startswith("/dev/shm, through which loader processes are sent"), done


SMALL_SHARED_MEMORY = """
import ctypes, sys
import torch
from torch.utils.data import TensorDataset
from holdfast.training.data.loader import FixedSizePlan, Loader
from holdfast.training.errors import LoaderError

def main():
    libc = ctypes.CDLL(None)
    if libc.unshare(0x20000) or libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None):
        sys.exit(int(sys.argv[1]))
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        sys.exit(int(sys.argv[1]))
    dataset = TensorDataset(torch.zeros(64, 5000))
    loader = Loader(
        dataset, FixedSizePlan(64, 16, False, 0), num_microbatches=1, num_workers=1,
        has_persistent_workers=False, prefetch_factor=1, seed=0, should_pin=False,
    )
    try:
        for _ in loader.steps(0, 0):
            pass
    except LoaderError as error:
        print(error)
    loader.close()

if __name__ == "__main__":
    main()
"""


def leave_free(folder: Path, num_bytes: int) -> None:
    """Fill a disk up to so many bytes."""
    free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filling").write_bytes(bytes(free_bytes - num_bytes))


def test_a_full_disk_is_told_by_publish_and_pull(tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "source")
    disk = tmp_path / "disk"
    disk.mkdir()

    def act(folder: Path) -> None:
        leave_free(folder, 20_000)
        with pytest.raises(StorageFullError, match=r"bytes are needed and [\d,]+ are free"):
            Registry(folder).publish(source)
        assert not list(folder.glob("registry/*/versions/*"))
        with pytest.raises(StorageFullError, match=r"there\.partial.* make room and go on"):
            pull(FolderSource(source), folder / "there")

    on_a_small_disk(disk, act)


def test_a_folder_that_prefect_cannot_write_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Prefect's folder .* name another with PREFECT_HOME"):
        require_prefect_home(tmp_path / "file/prefect")
    disk = tmp_path / "disk"
    disk.mkdir()

    def act(folder: Path) -> None:
        with pytest.raises(StorageFullError, match=r"Prefect's folder .* is full"):
            require_prefect_home(folder)

    on_a_small_disk(disk, act)


def test_a_probe_writes_through_no_link(tmp_path: Path) -> None:
    """Its name is drawn, and what stands there already is never opened."""
    require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_home_that_cannot_be_written_ends_a_run_in_one_line(tmp_path: Path) -> None:
    with within(120.0):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "holdfast", "run", "digits", "--store", str(tmp_path)],
            env={**os.environ, "PREFECT_HOME": "/proc/nowhere", "PREFECT_API_URL": ""},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "Prefect's folder /proc/nowhere is not writable" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
