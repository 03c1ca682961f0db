"""Run one stage of a run as a child process, and never leave it behind.

Training and everything else that needs torch runs in ``python -m holdfast.training STAGE``, so that
the process which talks to Prefect stays light and a stage can be stopped at any moment.

- A stop of this process is forwarded: the child gets SIGTERM and its grace period to save.
- The death of this process is noticed: the kernel sends the child SIGTERM (``PR_SET_PDEATHSIG``),
  so that it saves and goes; no orphan keeps training. The kernel watches the *thread* that
  started the child: call ``run_stage`` from the main thread.
- The child has a process group of its own, so that a signal to this one reaches it once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Literal

from holdfast.tasks.job import Job
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.preemption.deathwatch import EXIT_PREEMPTED, watched

Stage = Literal["segment", "candidates", "evaluate", "export", "promote", "report"]
Event = dict[str, Any]
OnEvent = Callable[[Event], None]
OnLog = Callable[[str], None]

EXIT_BAD_INPUT = 2
FINAL_ERRORS = (
    "ExportError",
    "ParityError",
    "BundleError",
    "SelectionError",
    "NonFiniteLossError",
    "LossJumpError",
    "NonFiniteStateError",
    "OutOfMemoryError",
)
NUM_TAIL_LINES = 20
KILL_MARGIN_S = 2.0


@dataclass(frozen=True)
class StageCommand:
    """``python -m holdfast.training STAGE`` for one run."""

    stage: Stage
    job: Job
    grace_period_s: float = 30.0

    def argv(self) -> list[str]:
        """The command line. A resume, and each stage after training, starts from ``run.json``."""
        job = self.job
        options = ["--experiment", job.experiment, "--store", str(job.store)]
        options += ["--run-id", job.run_id, "--progress", "jsonl"]
        options += ["--resume"] if job.is_resume or self.stage != "segment" else []
        options += ["--strict"] if job.is_strict else []
        options += ["--config", str(job.config_file)] if job.config_file else []
        options += [part for override in job.overrides for part in ("--set", override)]
        options += [f"--argument={argument}" for argument in job.arguments]
        return python_command("holdfast.training", self.stage, *options)


@dataclass(frozen=True)
class StageOutcome:
    """How a stage's process ended.

    Attributes:
        outcome: ``completed``, ``preempted`` (saved, exit code 75) or ``failed``.
        exit_code: the process's; negative is the number of the signal that killed it.
        step: the step it reached, where it told one.
        error: ``type`` and ``message``, where it failed with an error of its own.
        notice: ``source`` and ``reason``, where a notice stopped it.
        log_tail: the last lines of its log.
        has_champion: False for a script that has trained and hands no champion over.
    """

    outcome: Literal["completed", "preempted", "failed"]
    exit_code: int
    step: int | None = None
    error: Event | None = None
    notice: Event | None = None
    log_tail: tuple[str, ...] = ()
    has_champion: bool = True

    @property
    def is_final(self) -> bool:
        """Whether the same would happen again: the input is wrong, or a proof failed."""
        error_type = self.error.get("type") if self.error else None
        return self.exit_code == EXIT_BAD_INPUT or error_type in FINAL_ERRORS

    def explain(self) -> str:
        """One line on why it failed: the child's own error, or how its process ended."""
        if self.error is not None:
            return f"{self.error.get('type', 'error')}: {self.error.get('message', '')}"
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        last = f": {self.log_tail[-1]}" if self.log_tail else ""
        return f"ended with exit code {self.exit_code}{last}"


def run_stage(command: StageCommand, on_event: OnEvent, on_log: OnLog) -> StageOutcome:
    """Run a stage to its end.

    ``on_event`` and ``on_log`` are called in this thread. Whatever is raised in it meanwhile
    (Prefect's TerminationSignal, KeyboardInterrupt, an error of a callback) stops the child: it
    gets SIGTERM, then SIGKILL once the grace period is over, and only then the exception goes on.
    The child has always ended when this function is left.
    """
    lines: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
    child = _start(command)
    readers = [
        _read_lines(child.stdout, "event", lines),
        _read_lines(child.stderr, "log", lines),
    ]
    listener = _Listener(on_event, on_log)
    try:
        _pump(child, lines, listener)
    except BaseException:
        ignore_sigterm()
        _stop(child, lines, listener, command.grace_period_s)
        raise
    finally:
        for reader in readers:
            reader.join(timeout=KILL_MARGIN_S)
    return listener.outcome(child.returncode)


def ignore_sigterm() -> None:
    """Further SIGTERMs would interrupt the wait for the child. For the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Listener:
    """Passes lines on and remembers what the outcome needs."""

    def __init__(self, on_event: OnEvent, on_log: OnLog) -> None:
        self._on_event = on_event
        self._on_log = on_log
        self._tail: deque[str] = deque(maxlen=NUM_TAIL_LINES)
        self._last: Event = {}
        self._step: int | None = None
        self._notice: Event | None = None

    def take(self, kind: str, line: str) -> None:
        event = _parse_event(line) if kind == "event" else None
        if event is None:
            self._tail.append(line)
            self._on_log(line)
            return
        self._step = event.get("step", self._step)
        if event["event"] == "outcome":
            self._last = event
        elif event["event"] == "notice":
            self._notice = event
        self._on_event(event)

    def outcome(self, exit_code: int) -> StageOutcome:
        named: dict[int, Literal["completed", "preempted"]] = {
            0: "completed",
            EXIT_PREEMPTED: "preempted",
        }
        return StageOutcome(
            outcome=named.get(exit_code, "failed"),
            exit_code=exit_code,
            step=self._step,
            error=self._last.get("error"),
            notice=self._notice,
            log_tail=tuple(self._tail),
            has_champion=self._last.get("has_champion", True),
        )


def _start(command: StageCommand) -> subprocess.Popen[str]:
    return subprocess.Popen(
        watched(command.argv()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,
    )


def _read_lines(
    stream: IO[str] | None, kind: str, lines: queue.SimpleQueue[tuple[str, str | None]]
) -> threading.Thread:
    """A thread that puts each line, and None at the end, on the queue."""
    assert stream is not None

    def read() -> None:
        with stream:
            for line in stream:
                lines.put((kind, line.rstrip("\n")))
        lines.put((kind, None))

    thread = threading.Thread(target=read, name=f"child-{kind}", daemon=True)
    thread.start()
    return thread


def _pump(
    child: subprocess.Popen[str],
    lines: queue.SimpleQueue[tuple[str, str | None]],
    listener: _Listener,
    deadline_s: float | None = None,
) -> None:
    """Pass lines on until both streams have ended and the child is gone, or time is up."""
    num_open = 2
    while num_open > 0 or child.poll() is None:
        now_s = time.monotonic()
        if deadline_s is not None and now_s >= deadline_s:
            return
        if deadline_s is None and child.poll() is not None:
            deadline_s = now_s + KILL_MARGIN_S  # a grandchild may hold the pipes open
        try:
            kind, line = lines.get(timeout=0.1)
        except queue.Empty:
            continue
        if line is None:
            num_open -= 1
        else:
            listener.take(kind, line)


def _stop(
    child: subprocess.Popen[str],
    lines: queue.SimpleQueue[tuple[str, str | None]],
    listener: _Listener,
    grace_period_s: float,
) -> None:
    """SIGTERM, the grace period, then SIGKILL to the child's whole group."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
    try:
        _pump(child, lines, listener, deadline_s=time.monotonic() + grace_period_s)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _parse_event(line: str) -> Event | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None
