from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from training.durable_json import write_json_durably
from training.errors import LeaseHeldError, LeaseLostError, StorageError
from training.lease import Lease, read_lease
from training.process_identity import current_process
from training.run_paths import RunDirectory

TTL_S = 30.0
OTHER_MACHINE = replace(current_process(), host="other", boot_id="another boot")
HOLDER = """
import sys
from pathlib import Path
from training.lease import Lease
from training.errors import HoldfastError
from training.run_paths import RunDirectory
run, ttl_s = RunDirectory(Path(sys.argv[1])), float(sys.argv[2])
lease = Lease.acquire(run, ttl_s)
print(lease.staging, flush=True)
for line in sys.stdin:
    try:
        exec(line)
        print("done", flush=True)
    except (HoldfastError, OSError) as error:
        print(type(error).__name__, error, flush=True)
"""
CONTENDER = """
import sys
from pathlib import Path
from training.lease import Lease
from training.errors import LeaseHeldError
from training.run_paths import RunDirectory
sys.stdin.readline()
try:
    lease = Lease.acquire(RunDirectory(Path(sys.argv[1])), 60.0)
except LeaseHeldError as error:
    print("held", error, flush=True)
else:
    print("won", lease.generation, flush=True)
    sys.stdin.readline()
"""
CRASHER = """
import os, sys
from pathlib import Path
from training.lease import Lease
from training.run_paths import RunDirectory
run = RunDirectory(Path(sys.argv[1]))

def crash_at(number):
    num_events = 0
    def hook(event, arguments):
        nonlocal num_events
        if arguments and str(run.path) in str(arguments[0]):
            num_events += 1
            if num_events == number:
                os._exit(9)
    sys.addaudithook(hook)

num_crashes = 0
while True:
    child = os.fork()
    if child == 0:
        crash_at(num_crashes + 1)
        lease = Lease.acquire(run, 3600.0)
        (lease.staging / "commit").mkdir()
        lease.check()
        lease.release()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with Lease.acquire(run, 3600.0) as lease:
        lease.check()
    if status == 0:
        break
    assert status == 9, status
    num_crashes += 1
print(num_crashes, len(list(run.staging.iterdir())))
"""


class Process:
    """Another process that answers one line for each line it is told."""

    def __init__(self, program: str, *arguments: object, host: str = "") -> None:
        environment = {**os.environ, "HOLDFAST_HOST": host}
        self.popen = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def tell(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def answer(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()


@contextlib.contextmanager
def process(program: str, *arguments: object, host: str = "") -> Iterator[Process]:
    child = Process(program, *arguments, host=host)
    try:
        yield child
    finally:
        child.kill()
        assert child.popen.stdin is not None
        assert child.popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.popen.stdin.close()
        child.popen.stdout.close()


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


def test_a_waiting_contender_gets_the_lease_when_it_is_released(run: RunDirectory) -> None:
    with process(HOLDER, run.path, TTL_S) as holder:
        holder.answer()
        holder.tell("import time; time.sleep(0.4); lease.release()")
        with Lease.acquire(run, TTL_S, wait_s=20.0) as lease:
            assert lease.generation == 2


def test_a_killed_holder_of_this_machine_is_replaced_at_once(run: RunDirectory) -> None:
    with process(HOLDER, run.path, 3600.0) as holder:
        staging = Path(holder.answer())
        (staging / "half-written").mkdir()
        holder.kill()
        view = read_lease(run)
        assert view is not None
        assert view.status == "gone"
        with Lease.acquire(run, TTL_S) as lease:
            assert lease.generation == 2
        assert not staging.exists()


def test_a_zombie_counts_as_gone(run: RunDirectory) -> None:
    with process(HOLDER, run.path, 3600.0) as holder:
        holder.answer()
        holder.popen.send_signal(signal.SIGKILL)
        # Not waited for: the kernel keeps its entry with state Z until the parent asks.
        os.waitid(os.P_PID, holder.popen.pid, os.WEXITED | os.WNOWAIT)
        Lease.acquire(run, TTL_S).release()


def test_a_used_again_process_id_is_not_the_holder(run: RunDirectory) -> None:
    former = replace(current_process(), pid_start=1)
    Lease.acquire(run, 3600.0, identity=former)
    Lease.acquire(run, TTL_S).release()


def test_a_holder_of_another_machine_is_replaced_only_after_its_ttl(run: RunDirectory) -> None:
    with process(HOLDER, run.path, TTL_S, host="elsewhere") as holder:
        holder.answer()
        holder.kill()
        view = read_lease(run)
        assert view is not None
        assert (view.status, view.process.host) == ("held", "elsewhere")
        with pytest.raises(LeaseHeldError, match="elsewhere"):
            Lease.acquire(run, TTL_S)
        make_overdue(run, 1, TTL_S + 1)
        Lease.acquire(run, TTL_S).release()


@pytest.mark.parametrize("host", ["", "elsewhere"], ids=["same machine", "other machine"])
def test_a_stopped_holder_that_wakes_up_changes_nothing(run: RunDirectory, host: str) -> None:
    run.checkpoints.mkdir(parents=True)
    with process(HOLDER, run.path, 0.6, host=host) as holder:
        staging = holder.answer()
        assert holder.ask("(lease.staging / 'commit').mkdir()") == "done"
        holder.popen.send_signal(signal.SIGSTOP)
        with Lease.acquire(run, TTL_S, wait_s=20.0) as lease:
            assert lease.generation == 2
            before = sorted(run.path.rglob("*"))
            holder.popen.send_signal(signal.SIGCONT)
            rename = "(lease.staging / 'commit').rename(run.checkpoints / 'step-00000001')"
            assert holder.ask(rename).startswith("FileNotFoundError")
            assert holder.ask("(lease.staging / 'new').mkdir()").startswith("FileNotFoundError")
            assert holder.ask("lease.check()").startswith("LeaseLostError")
            assert holder.ask("lease.release()") == "done"
            assert staging not in map(str, run.staging.iterdir())
            assert sorted(run.path.rglob("*")) == before
            lease.check()


def test_a_holder_that_slept_and_was_not_replaced_goes_on(run: RunDirectory) -> None:
    with process(HOLDER, run.path, 0.3) as holder:
        holder.answer()
        holder.popen.send_signal(signal.SIGSTOP)
        time.sleep(0.8)
        holder.popen.send_signal(signal.SIGCONT)
        assert holder.ask("lease.check()") == "done"
        view = read_lease(run)
        assert view is not None
        assert view.status == "held"


def test_of_many_contenders_exactly_one_wins(run: RunDirectory) -> None:
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(process(CONTENDER, run.path)) for _ in range(8)]
        for contender in contenders:
            contender.tell("go")
        answers = [contender.answer() for contender in contenders]
    assert sorted(answer.split()[0] for answer in answers) == ["held"] * 7 + ["won"]


def test_of_many_contenders_for_a_dead_holders_lease_exactly_one_wins(run: RunDirectory) -> None:
    with process(HOLDER, run.path, 3600.0) as holder:
        holder.answer()
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(process(CONTENDER, run.path)) for _ in range(8)]
        for contender in contenders:
            contender.tell("go")
        answers = [contender.answer() for contender in contenders]
        winners = [answer for answer in answers if answer.startswith("won")]
        assert winners == ["won 2"]
        assert len(names(run.staging)) == 1


def test_the_lease_is_renewed_while_it_is_held(run: RunDirectory) -> None:
    with Lease.acquire(run, 0.4):
        time.sleep(1.0)
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
        time.sleep(0.3)
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


def test_a_dead_holder_whose_clock_was_fast_does_not_hold_the_lease_for_that_long(
    run: RunDirectory,
) -> None:
    with process(HOLDER, run.path, 0.3, host="elsewhere") as holder:
        holder.answer()
    make_overdue(run, 1, age_s=-3600.0)
    Lease.acquire(run, TTL_S).release()


def test_a_living_holder_whose_clock_is_fast_keeps_its_lease(run: RunDirectory) -> None:
    first = Lease.acquire(run, 0.4, identity=OTHER_MACHINE)
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
    for name in ("00000001-dead", "fenced-00000000-x-y"):
        (run.staging / name).mkdir(parents=True)
        write_json_durably(run.staging / name / "x.json", 1)
    with Lease.acquire(run, TTL_S) as lease:
        assert names(run.staging) == [lease.staging.name]


def test_a_contender_for_a_later_generation_is_left_alone(run: RunDirectory) -> None:
    later = run.staging / "00000007-token"
    later.mkdir(parents=True)
    with Lease.acquire(run, TTL_S):
        assert later.is_dir()


def test_a_crash_at_any_file_operation_leaves_a_lease_that_can_be_taken(
    run: RunDirectory,
) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", CRASHER, str(run.path)], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    num_crashes, num_staging_folders = map(int, outcome.stdout.split())
    assert num_crashes > 15
    assert num_staging_folders == 0


def test_reading_a_lease_imports_no_heavy_module() -> None:
    program = "import training.lease, sys; sys.exit(bool({'torch', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
