"""Run a training script until it completes, within the two budgets.

A script that uses ``holdfast.run`` exits with 75 once it has saved at a notice, and goes on where
it stood when it is started again. What came of it, and where its run lies, it leaves in the file
that HOLDFAST_OUTCOME names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from holdfast.tasks.attempts import newest_step
from holdfast.tasks.child import EXIT_BAD_INPUT, FINAL_ERRORS
from holdfast.tasks.limits import Limits
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.own_loop.environment import OUTCOME
from holdfast.training.preemption.deathwatch import EXIT_PREEMPTED, watched
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.stored_json import read_json
from holdfast.training.told_errors import error_line

STARTED = Path(__file__).with_name("started.py")
NOTICES = (signal.SIGTERM, signal.SIGUSR1)
FORWARDED = (*NOTICES, signal.SIGINT)
STAYS = ("signal", "wall_time")  # notices after which this machine may go on
WAKE_S = 0.2  # how soon a pause notices a signal


@dataclass
class _Ended:
    """How one start of the script ended."""

    code: int
    was_stopped: bool
    had_progress: bool
    is_final: bool
    source: str | None
    has_run: bool
    error: str | None


@dataclass
class ScriptRunner:
    """Starts a command again and again.

    Attributes:
        command: of the script, with its arguments.
        environment: of its process.
        tell: is given one line each time that the script is started again.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    limits: Limits
    tell: Callable[[str], None]
    _received: list[int] = field(default_factory=list)
    _child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run to the end. Returns the exit code: the script's own, for the last time.

        To be called in the main thread: signals of notices are forwarded, and then it is not
        started again.
        """
        num_crashes = num_idle = 0
        with self._forwarding(), tempfile.TemporaryDirectory(prefix="holdfast-exec-") as folder:
            outcome_file = Path(folder) / "outcome.json"
            while True:
                ended = self._start(outcome_file)
                if ended.had_progress:
                    num_crashes = num_idle = 0
                is_preempted = ended.code == EXIT_PREEMPTED
                num_crashes += not is_preempted
                num_idle += is_preempted and not ended.had_progress
                is_over = (
                    num_crashes > self.limits.max_crashes
                    or num_idle > self.limits.max_idle_preemptions
                )
                if ended.code == 0 or ended.was_stopped or ended.is_final or is_over:
                    return self._code(ended)
                pause_s = 0.0
                if not is_preempted:
                    pause_s = self.limits.crash_backoff_s * 2 ** (num_crashes - 1)
                self._tell_again(ended, pause_s)
                self._pause(pause_s)
                if self._received:
                    return EXIT_PREEMPTED

    def _code(self, ended: _Ended) -> int:
        """The exit code of it all; the last word to the user, where the script had none."""
        if ended.code == 0 and not ended.has_run:
            raise InputError(
                f"{self._name} has ended, and never called holdfast.run: it was run like any "
                f"program, and nothing is kept of it; see docs/own_loop.md"
            )
        if ended.is_final and ended.error and ended.code != EXIT_BAD_INPUT:
            self.tell(error_line(f"{ended.error}; another start would end so, too"))
        if -ended.code in self._received and -ended.code in NOTICES:
            return EXIT_PREEMPTED  # before its run answered it, or after: there is nothing to save
        return ended.code if ended.code >= 0 else 128 - ended.code

    @property
    def _name(self) -> str:
        """What the user has named."""
        return next((word for word in self.command[2:] if word != "-m"), self.command[-1])

    def _pause(self, seconds: float) -> None:
        """Until they are over, or a notice comes."""
        end_s = time.monotonic() + seconds
        while not self._received and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, WAKE_S))

    def _start(self, outcome_file: Path) -> _Ended:
        outcome_file.unlink(missing_ok=True)
        environment = {**self.environment, OUTCOME: str(outcome_file)}
        self._child = subprocess.Popen(
            watched([*self.command]), stdin=subprocess.DEVNULL, env=environment, process_group=0
        )
        for number in [*self._received]:  # that came before there was a child
            self._child.send_signal(number)
        code = self._child.wait()
        told = _read(outcome_file)
        run = RunDirectory(Path(told["run"])) if "run" in told else None
        source, is_sure = told.get("source"), bool(told.get("is_sure"))
        start_step = told.get("start_step")
        had_progress = run is not None and start_step is not None and newest_step(run) > start_step
        is_leaving = code == EXIT_PREEMPTED and source not in (None, *STAYS)
        return _Ended(
            code=code,
            was_stopped=bool(self._received) or is_leaving,
            had_progress=had_progress,
            is_final=code == EXIT_BAD_INPUT
            or (is_sure and not had_progress)
            or _has_failed_for_good(run),
            source=source,
            has_run=run is not None,
            error=told.get("error"),
        )

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        def forward(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self._received.append(number)
            if self._child is not None:
                self._child.send_signal(number)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell_again(self, ended: _Ended, pause_s: float) -> None:
        if ended.code == EXIT_PREEMPTED:
            how = f"was preempted ({ended.source})" if ended.source else "has saved"
        elif ended.code < 0:
            how = f"was killed by {signal.Signals(-ended.code).name}"
        else:
            how = f"ended with exit code {ended.code}"
        self.tell(f"the script {how}; again{f' in {pause_s:.0f} s' if pause_s else ''}")


def script_command(arguments: Sequence[str], python: str) -> list[str]:
    """The command line of a script and its arguments, or of ``-m`` and a module.

    Raises InputError where there is no such script.
    """
    first = arguments[0]
    if first == "-m" and len(arguments) > 1:
        return [python, os.fspath(STARTED), *arguments]
    if first.startswith("-") and first != "-m":
        raise InputError(
            f"{first} is no option of holdfast exec: options come before the script; see --help"
        )
    path = Path(first)
    if path.name.startswith("python") and not path.suffix:
        raise InputError(f"leave {first} out: write holdfast exec {' '.join(arguments[1:])}")
    if not path.is_file():
        raise InputError(
            f"there is no script {first}; expected the path of a Python file, or -m and a module"
        )
    return [python, os.fspath(STARTED), os.fspath(path), *arguments[1:]]


def _read(outcome_file: Path) -> dict[str, Any]:
    try:
        told = read_json(outcome_file)
    except (FileNotFoundError, HoldfastError):
        return {}
    return told if isinstance(told, dict) else {}


def _has_failed_for_good(run: RunDirectory | None) -> bool:
    """Whether the newest segment ended with an error that another start would end with, too."""
    if run is None:
        return False
    try:
        newest = read_segments(run)[-1]
    except (HoldfastError, IndexError):
        return False
    return newest.error is not None and newest.error.type in FINAL_ERRORS
