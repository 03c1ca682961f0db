from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.preemption import (
    Notice,
    PreemptionMonitor,
    SignalSource,
    grace_warning,
    stop_decision,
)
from training.signals import SignalFlag, current_signal_flag, install_signal_flag, signals_held

HEAD = """
import os, signal, subprocess, sys, time
from training.preemption import *
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


def test_the_nearest_deadline_is_the_notice() -> None:
    monitor = PreemptionMonitor([])
    unknown, late, soon = (Notice("test", "r", deadline) for deadline in (None, 20.0, 10.0))
    for notice in (unknown, late, soon, late):
        monitor._deliver(notice)
    assert monitor.notice is soon
    assert monitor.notice is soon


def test_an_advance_notice_is_taken_once_and_is_no_notice() -> None:
    monitor = PreemptionMonitor([])
    advance = Notice("aws", "rebalance", None, is_advance=True)
    monitor._deliver(advance)
    assert monitor.notice is None
    assert monitor.take_advance() is advance
    assert monitor.take_advance() is None


def test_a_record_of_a_notice_holds_no_monotonic_time() -> None:
    assert Notice("gcp", "preempted", 130.0).as_record(now_s=100.0) == {
        "source": "gcp",
        "reason": "preempted",
        "is_advance": False,
        "remaining_s": 30.0,
    }


def test_polling_for_a_notice_costs_less_than_a_microsecond_or_two() -> None:
    monitor = PreemptionMonitor([])
    begin_s = time.perf_counter()
    for _ in range(10_000):
        assert monitor.notice is None
    assert time.perf_counter() - begin_s < 0.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_becomes_a_notice_at_once(flag: SignalFlag, number: signal.Signals) -> None:
    with PreemptionMonitor([SignalSource(25.0)]) as monitor:
        now_s = time.monotonic()
        os.kill(os.getpid(), number)
        notice = monitor.notice
    assert notice is not None
    assert (notice.source, notice.reason) == ("signal", number.name)
    assert notice.deadline_s == pytest.approx(now_s + 25.0, abs=1.0)


def test_a_signal_before_the_monitor_starts_is_heard(flag: SignalFlag) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert flag.first is not None
    time.sleep(0.05)
    with PreemptionMonitor([SignalSource(25.0)]) as monitor:
        assert monitor.notice is not None
        assert monitor.notice.deadline_s == flag.first.received_s + 25.0


def test_a_stopped_monitor_keeps_its_notice_and_hears_no_more(flag: SignalFlag) -> None:
    with PreemptionMonitor([SignalSource(25.0)]) as monitor:
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert monitor.notice is not None
    assert monitor.notice.reason == "SIGTERM"


def test_a_second_interrupt_stops_at_once(flag: SignalFlag) -> None:
    os.kill(os.getpid(), signal.SIGINT)
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


def test_outside_the_main_thread_a_signal_source_warns_and_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = SignalSource(1.0)
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=source.start, args=([].append,))
        thread.start()
        thread.join()
    source.stop()
    assert "outside the main thread" in caplog.text


def test_held_signals_arrive_after_the_block(flag: SignalFlag) -> None:
    with signals_held():
        os.kill(os.getpid(), signal.SIGTERM)
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
        f"exec_held(['-c', {second!r}], {{**os.environ, 'MARK': 'set'}})\n"
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
        "    exec_held(['-c', ''], {})\n"
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
        "import sys; from training.preemption import install_signal_flag; install_signal_flag();"
        "sys.exit(bool({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0


times = st.floats(0, 1e4)


@given(times, times, times, times)
def test_a_save_is_only_begun_when_step_and_save_fit(
    now_s: float, left_s: float, step_s: float, save_s: float
) -> None:
    notice = Notice("test", "r", now_s + left_s)
    decision = stop_decision(notice, now_s=now_s, step_s=step_s, save_s=save_s)
    if decision == "finish_and_save":
        assert step_s + save_s <= left_s + 1e-6
    else:
        assert step_s + 1.2 * save_s >= left_s - 1e-6


@given(times, times, times, times)
def test_more_time_never_turns_a_save_into_none(
    left_s: float, more_s: float, step_s: float, save_s: float
) -> None:
    def decide(seconds: float) -> str:
        return stop_decision(Notice("t", "r", seconds), now_s=0.0, step_s=step_s, save_s=save_s)

    if decide(left_s) == "finish_and_save":
        assert decide(left_s + more_s) == "finish_and_save"


def test_without_a_deadline_or_a_measurement_a_save_is_tried() -> None:
    assert stop_decision(Notice("t", "r", None), now_s=0.0, step_s=9.0, save_s=9.0) == (
        "finish_and_save"
    )
    soon = Notice("t", "r", 10.0)
    assert stop_decision(soon, now_s=0.0, step_s=9.0, save_s=None) == "finish_and_save"
    assert stop_decision(soon, now_s=2.0, step_s=9.0, save_s=None) == "trust_last_checkpoint"


def test_after_the_deadline_the_last_checkpoint_is_trusted() -> None:
    late = Notice("t", "r", 10.0)
    assert stop_decision(late, now_s=11.0, step_s=0.0, save_s=0.0) == "trust_last_checkpoint"


def test_a_grace_period_that_is_too_short_is_warned_about_with_all_figures() -> None:
    warning = grace_warning(grace_period_s=30.0, step_s=1.0, save_s=28.0)
    assert warning is not None
    assert "28.0 s" in warning
    assert "preemption.grace_period_s=30" in warning
    assert grace_warning(grace_period_s=30.0, step_s=1.0, save_s=10.0) is None
