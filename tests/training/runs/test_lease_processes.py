from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.training.errors import LeaseHeldError
from holdfast.training.runs.lease import Lease, read_lease
from holdfast.training.runs.paths import RunDirectory

TTL_S = 30.0


HOLDER = """
import sys
from pathlib import Path
from holdfast.training.runs.lease import Lease
from holdfast.training.errors import HoldfastError
from holdfast.training.runs.paths import RunDirectory
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
from holdfast.training.runs.lease import Lease
from holdfast.training.errors import LeaseHeldError
from holdfast.training.runs.paths import RunDirectory
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
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
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
    with process(HOLDER, run.path, 0.8) as holder:
        holder.answer()
        holder.popen.send_signal(signal.SIGSTOP)
        time.sleep(1.2)
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


def test_a_dead_holder_whose_clock_was_fast_does_not_hold_the_lease_for_that_long(
    run: RunDirectory,
) -> None:
    with process(HOLDER, run.path, 0.3, host="elsewhere") as holder:
        holder.answer()
    make_overdue(run, 1, age_s=-3600.0)
    Lease.acquire(run, TTL_S).release()


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
