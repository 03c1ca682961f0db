from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.training.preemption.signals import (
    SignalFlag,
    current_signal_flag,
    install_signal_flag,
    reclaim_signals,
    signals_held,
)

HEAD = """
import os, signal, subprocess, sys, time
from holdfast.training.preemption.notices import *
def ready():
    os.write(1, b"ready\\n")
"""


WAITS_FOR_A_NOTICE = """
install_signal_flag()
with PreemptionMonitor([SignalSource(30.0)]) as monitor:
    ready()
    while monitor.notice is None:
        time.sleep(0.01)
    print(monitor.notice.reason, flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def program(text: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed ``ready``; it leads a process group of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", HEAD + text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            assert next_line(child) == "ready"
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def next_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@pytest.fixture
def flag() -> Iterator[SignalFlag]:
    yield install_signal_flag()
    current_signal_flag().uninstall()


def test_a_second_interrupt_stops_at_once(flag: SignalFlag) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # The same Ctrl-C, passed on by a wrapper.
    time.sleep(0.15)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_repeated_sigterm_does_not_stop_a_save(flag: SignalFlag) -> None:
    for _ in range(50):
        os.kill(os.getpid(), signal.SIGTERM)
    assert flag.first is not None


def test_the_flag_is_put_up_once_and_taken_down_to_what_was_there_before() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    flag = install_signal_flag()
    assert install_signal_flag() is flag
    flag.uninstall()
    flag.uninstall()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_held_signals_arrive_after_the_block(flag: SignalFlag) -> None:
    with signals_held():
        signal.raise_signal(signal.SIGTERM)  # To this thread; kill() may take another one.
        assert flag.first is None
    assert flag.first is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_process_survives_its_signal_and_reports_it(number: signal.Signals) -> None:
    with program(WAITS_FOR_A_NOTICE) as child:
        child.send_signal(number)
        assert next_line(child) == number.name
        child.communicate("end\n")
        assert child.returncode == 0


def test_a_second_ctrl_c_ends_a_process_within_a_moment() -> None:
    with program(WAITS_FOR_A_NOTICE) as child:
        child.send_signal(signal.SIGINT)
        assert next_line(child) == "SIGINT"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=10) == -signal.SIGINT


def test_a_signal_during_exec_and_start_up_is_heard_by_the_new_program() -> None:
    second = HEAD + (
        "assert os.environ['MARK'] == 'set'\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"  # Would end it, were it not held back.
        "time.sleep(0.1)\n"
        "flag = install_signal_flag()\n"
        "with PreemptionMonitor([SignalSource(30.0)]) as monitor:\n"
        "    print(monitor.notice.reason, os.getpid(), flush=True)\n"
    )
    first = (
        "ready(); sys.stdin.readline()\n"
        "hold_signals()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        f"exec_held([sys.executable, '-c', {second!r}], {{**os.environ, 'MARK': 'set'}})\n"
    )
    with program(first) as child:
        output, errors = child.communicate("go\n")
        assert child.returncode == 0, errors
        assert output.split()[1] == str(child.pid)
        assert output.split()[0] in ("SIGUSR1", "SIGTERM")


def test_a_failed_exec_lets_signals_through_again() -> None:
    text = (
        "sys.executable = '/nowhere/python'\n"
        "try:\n"
        "    exec_held([sys.executable, '-c', ''], {})\n"
        "except OSError:\n"
        "    ready()\n"
        "time.sleep(60)\n"
    )
    with program(text) as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=10) == -signal.SIGTERM


FORKS_A_WORKER = """
install_signal_flag()
with signals_held():
    worker = os.fork()
    if worker == 0:
        {setup}
        ready()
        for second in range(600):
            time.sleep(0.1)
        os._exit(5)
os.write(1, b"parent %d\\n" % worker)
line = sys.stdin.readline()
if line == "terminate\\n":
    os.kill(worker, signal.SIGTERM)
print("worker", os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def worker_of(text: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with subprocess.Popen(
        [sys.executable, "-c", HEAD + text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            lines = sorted(next_line(child) for _ in range(2))
            assert lines[1] == "ready"
            yield child, int(lines[0].split()[1])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_survives_signals_to_its_group_until_the_parent_ends_it() -> None:
    with worker_of(FORKS_A_WORKER.format(setup="ignore_in_worker()")) as (child, worker):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.killpg(child.pid, number)
        time.sleep(0.3)
        assert is_running(worker)
        output, _ = child.communicate("terminate\n", timeout=10)
        assert output.split() == ["worker", "0"]


def test_an_orphaned_worker_can_be_ended_by_anybody() -> None:
    with worker_of(FORKS_A_WORKER.format(setup="ignore_in_worker()")) as (child, worker):
        child.send_signal(signal.SIGKILL)
        child.wait()
        os.kill(worker, signal.SIGTERM)
        deadline_s = time.monotonic() + 10
        while is_alive(worker):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs that has another parent than us, zombies not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_any_other_forked_child_can_be_terminated_as_usual() -> None:
    """A pool of the user's own joins its processes after SIGTERM: ignoring it would hang."""
    setup = "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})"
    with worker_of(FORKS_A_WORKER.format(setup=setup)) as (child, _):
        output, _ = child.communicate("terminate\n", timeout=10)
        assert output.split() == ["worker", str(-signal.SIGTERM)]


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_a_multiprocessing_worker_survives_its_group_and_ends_with_terminate(
    start_method: str,
) -> None:
    text = f"""
import multiprocessing, multiprocessing.resource_tracker
def work(connection):
    ignore_in_worker()
    connection.send(os.getpid())
    time.sleep(60)
if __name__ == "__main__":
    install_signal_flag()
    context = multiprocessing.get_context({start_method!r})
    ours, theirs = context.Pipe()
    multiprocessing.resource_tracker.ensure_running()
    with signals_held():
        worker = context.Process(target=work, args=(theirs,), daemon=True)
        worker.start()
    ours.recv()
    ready()
    sys.stdin.readline()
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    print("exit", worker.exitcode, flush=True)
"""
    with as_file(text) as child:
        os.killpg(child.pid, signal.SIGTERM)
        time.sleep(0.3)
        output, errors = child.communicate("end\n", timeout=30)
        assert output.split() == ["exit", "0"], errors


@contextlib.contextmanager
def as_file(text: str) -> Iterator[subprocess.Popen[str]]:
    """As ``program``, from a file, which a spawned process can import again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "main.py")
        path.write_text(HEAD + text)
        with subprocess.Popen(
            [sys.executable, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as child:
            try:
                assert next_line(child) == "ready"
                yield child
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)


def test_the_flag_comes_up_without_heavy_imports() -> None:
    text = (
        "import sys; from holdfast.training.preemption.notices import install_signal_flag; "
        "install_signal_flag();"
        "sys.exit(bool({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0


TAKEN_OVER = """
install_signal_flag()
calls = []
{theirs}
reclaim_signals("now")
with PreemptionMonitor([SignalSource(30.0)]) as monitor:
    ready()
    while monitor.notice is None:
        time.sleep(0.01)
    print(monitor.notice.reason, flush=True)
    sys.stdin.readline()
    print(*calls, flush=True)
"""
THEIRS = {
    "a function": "signal.signal(signal.SIGTERM, lambda *_: calls.append('theirs'))",
    "one that calls the handler before it": """
before = signal.getsignal(signal.SIGTERM)
def theirs(number, frame):
    before(number, frame)
    calls.append('theirs')
signal.signal(signal.SIGTERM, theirs)""",
    "one that ends the process": """
def theirs(number, frame):
    calls.append('theirs')
    sys.exit(3)
signal.signal(signal.SIGTERM, theirs)""",
    "one that sends the signal again": """
def theirs(number, frame):
    calls.append('theirs')
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
signal.signal(signal.SIGTERM, theirs)""",
    "one that hangs": """
def theirs(number, frame):
    calls.append('theirs')
    time.sleep(3600)
signal.signal(signal.SIGTERM, theirs)""",
    "asyncio's": """
import asyncio, threading
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
loop.add_signal_handler(signal.SIGTERM, lambda: calls.append('theirs'))
threading.Thread(target=loop.run_forever, daemon=True).start()""",
}


@pytest.mark.parametrize("theirs", THEIRS.values(), ids=THEIRS)
def test_a_handler_of_the_experiment_s_is_called_and_the_notice_is_heard(theirs: str) -> None:
    with program(TAKEN_OVER.format(theirs=theirs)) as child:
        child.send_signal(signal.SIGTERM)
        assert next_line(child) == "SIGTERM"
        time.sleep(0.3)
        told, _ = child.communicate("end\n", timeout=20)
        assert told.split() == ["theirs"]
        assert child.returncode == 0


@pytest.mark.parametrize(
    "theirs",
    [
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        # As a library written in C does it: Python is not asked.
        "import ctypes; ctypes.CDLL(None).signal(15, ctypes.c_void_p(1))",
    ],
)
def test_a_signal_that_was_put_away_is_heard_again(theirs: str) -> None:
    with program(TAKEN_OVER.format(theirs=theirs)) as child:
        child.send_signal(signal.SIGTERM)
        assert next_line(child) == "SIGTERM"
        child.communicate("end\n", timeout=20)
        assert child.returncode == 0


def test_what_was_taken_back_is_told_once(
    flag: SignalFlag, caplog: pytest.LogCaptureFixture
) -> None:
    def shut_down(number: int, frame: object) -> None:
        """Nothing."""

    signal.signal(signal.SIGUSR1, shut_down)
    reclaim_signals("in a test")
    reclaim_signals("in a test")
    [record] = caplog.records
    assert "took over SIGUSR1, which " in record.getMessage()
    assert "shut_down handles now (seen in a test)" in record.getMessage()


def test_ctrl_c_that_the_parent_ignores_does_nothing_and_sigterm_works(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(HEAD + WAITS_FOR_A_NOTICE)
    shell = f"{sys.executable} {script} < {tmp_path}/in & echo $!; wait $!; echo ended $?"
    os.mkfifo(tmp_path / "in")
    with subprocess.Popen(
        ["sh", "-c", shell], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            with (tmp_path / "in").open("w") as stdin:
                pid = int(next_line(child))
                assert next_line(child) == "ready"
                os.kill(pid, signal.SIGINT)
                time.sleep(0.2)
                os.kill(pid, signal.SIGTERM)
                assert next_line(child) == "SIGTERM"
                stdin.write("end\n")
            assert next_line(child) == "ended 0"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
