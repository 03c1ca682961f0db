"""Run the pipeline from a terminal: start its engine, show its events, stop it in order."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from holdfast.flows.command_line.progress_view import Event, ProgressView
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.exactness.reproducibility import SAFE_PATH, python_command
from holdfast.training.preemption.deathwatch import EXIT_PREEMPTED, watched

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NUM_TAIL_LINES = 15
EXIT_INTERRUPTED = 130


@dataclass
class LocalOutcome:
    """How a local run ended.

    Attributes:
        exit_code: 0 completed, 75 preempted, 2 bad input, 1 failed, 130 stopped at once.
        result: the run's summary, where it completed.
        step: the newest step that was told.
        message: why it failed.
    """

    exit_code: int
    result: dict[str, Any] | None = None
    step: int | None = None
    message: str | None = None


@dataclass
class _Heard:
    """What the engine's events said so far."""

    result: dict[str, Any] | None = None
    step: int | None = None
    errors: list[Event] = field(default_factory=list)

    def take(self, event: Event) -> None:
        kind = event.get("event")
        if kind == "result":
            self.result = event["result"]
        elif kind == "error":
            self.errors.append(event)
        elif isinstance(event.get("step"), int):
            self.step = event["step"]


def run_locally(parameters: dict[str, Any], view: ProgressView) -> LocalOutcome:
    """Run the flow in a child process until it ends.

    The first Ctrl-C (or SIGTERM, SIGHUP) asks it to save and stop; the second ends it at once.
    """
    with tempfile.TemporaryFile("w+b") as log:
        engine, events = _start_engine(parameters, log)
        heard = _Heard()
        with _stops_forwarded(engine, view) as stops, events:
            for line in events:
                event = json.loads(line)
                heard.take(event)
                view.show(event)
            exit_code = engine.wait()
        _end_group(engine)
        view.close()
        return _outcome(exit_code, heard, was_stopped=bool(stops), log=log)


def resume_command(run_id: str, store: str | Path, default_store: str) -> str:
    """What a user types to go on."""
    is_default = str(store) == str(Path(default_store).absolute())
    option = "" if is_default else f" --store {shlex.quote(str(store))}"
    return f"holdfast resume {run_id}{option}"


def _start_engine(
    parameters: dict[str, Any], log: IO[bytes]
) -> tuple[subprocess.Popen[bytes], IO[str]]:
    """The engine in a session of its own, and the stream of its events."""
    reading, writing = os.pipe()
    try:
        engine = subprocess.Popen(
            watched(python_command("holdfast.flows.pipeline.engine")),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(writing,),
            env=_engine_environment(writing),
            start_new_session=True,
        )
    finally:
        os.close(writing)
    assert engine.stdin is not None
    with engine.stdin:
        engine.stdin.write(json.dumps(parameters).encode())
    return engine, os.fdopen(reading, encoding="utf-8")


def _engine_environment(descriptor: int) -> dict[str, str]:
    environment = {**os.environ, **SAFE_PATH, "HOLDFAST_EVENTS_FD": str(descriptor)}
    if not environment.get("PREFECT_API_URL"):
        environment.pop("PREFECT_API_URL", None)  # Prefect would take "" for an address
    return environment


@contextmanager
def _stops_forwarded(engine: subprocess.Popen[bytes], view: ProgressView) -> Iterator[list[int]]:
    """Forward stop signals while the block runs; yields the list of those that came."""
    stops: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stops.append(number)
        if len(stops) == 1:
            view.say("stopping: the run is being saved (once more to stop at once)")
            _signal_process(engine, signal.SIGTERM)
        else:
            _end_group(engine, signal.SIGKILL)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_process(engine: subprocess.Popen[bytes], number: int) -> None:
    if engine.poll() is None:
        engine.send_signal(number)


def _end_group(engine: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    """Signal what is left of the engine's session, such as its temporary server."""
    try:
        os.killpg(engine.pid, number)
    except ProcessLookupError:
        return


def _outcome(exit_code: int, heard: _Heard, *, was_stopped: bool, log: IO[bytes]) -> LocalOutcome:
    if exit_code == 0 and heard.result is not None:
        return LocalOutcome(0, result=heard.result, step=heard.step)
    if was_stopped and exit_code == -signal.SIGKILL:
        return LocalOutcome(EXIT_INTERRUPTED, step=heard.step)
    if was_stopped or exit_code == EXIT_PREEMPTED:
        return LocalOutcome(EXIT_PREEMPTED, step=heard.step)
    if heard.errors:
        error = heard.errors[-1]
        return LocalOutcome(error["exit_code"], step=heard.step, message=error["message"])
    return LocalOutcome(1, step=heard.step, message=_log_tail(exit_code, log))


def _log_tail(exit_code: int, log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()[-NUM_TAIL_LINES:]
    return "\n".join([f"the flow's process ended with {exit_code}; its last lines:", *lines])


def as_error(outcome: LocalOutcome) -> HoldfastError:
    """A failed outcome as the error that ends the command."""
    message = outcome.message or "failed"
    return InputError(message) if outcome.exit_code == 2 else HoldfastError(message)
