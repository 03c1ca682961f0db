"""Have a rehearsal done by a child process, and read what it found. No torch here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.training.exactness.reproducibility import (
    FILLED_MEMORY,
    child_environment,
    python_command,
)
from holdfast.training.rehearsal.findings import Finding, Report
from holdfast.training.rehearsal.request import Depth, RehearsalRequest, read_told

POLL_S = 0.05
TAIL_CHARS = 400
PROGRAM = "holdfast.training.rehearsal.acting"
STARTING = "start of the rehearsal"
Told = Sequence[dict[str, Any]]
OnAct = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """What is to be rehearsed; as in ``RehearsalRequest``."""

    experiment: str
    store: Path
    num_threads: int
    config_file: Path | None = None
    overrides: tuple[str, ...] = ()
    depth: Depth | None = None

    def request(self, scratch: str) -> RehearsalRequest:
        """The request to a child that works in a folder."""
        config_file = None if self.config_file is None else str(self.config_file.absolute())
        return RehearsalRequest(
            self.experiment,
            str(self.store.absolute()),
            scratch,
            self.num_threads,
            config_file,
            self.overrides,
            self.depth,
            tuple(str(Path(folder).absolute()) for folder in sys.path),
        )


def rehearse(
    asked: Asked,
    should_stop: Callable[[], bool] = lambda: False,
    on_act: OnAct = lambda _act, _number, _total: None,
) -> Report | None:
    """What a rehearsal finds; None where ``should_stop`` said so first.

    The child has ended, with all that it started, and its folder is gone when this returns or
    raises. ``on_act`` is told what is tried now, its number, and how many there are.
    """
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="holdfast-rehearsal-", ignore_cleanup_errors=True) as f:
        request = asked.request(f)
        request.write()
        with _child(request) as child:
            is_late = _wait(child, request, should_stop, on_act)
        if is_late is None:
            return None
        told = read_told(request.told)
        return _report(told, child.returncode, is_late, request.log, time.monotonic() - start_s)


@contextlib.contextmanager
def _child(request: RehearsalRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a session of its own: Ctrl-C reaches this process alone.

    It ends when its standard input does, so that it does not outlive a parent that is killed.
    """
    with request.log.open("wb") as log:
        child = subprocess.Popen(
            python_command(PROGRAM, str(request.path)),
            env={**child_environment(request.num_threads), **FILLED_MEMORY},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdin is not None
        child.stdin.close()


def _wait(
    child: subprocess.Popen[bytes],
    request: RehearsalRequest,
    should_stop: Callable[[], bool],
    on_act: OnAct,
) -> bool | None:
    """Whether the time was over before the end; None where it was stopped."""
    num_seen, deadline_s = 0, float("inf")
    while True:
        is_over = child.poll() is not None
        told = read_told(request.told)
        for line in told[num_seen:]:
            if line["kind"] == "plan":
                deadline_s = time.monotonic() + line["max_s"]
            elif line["kind"] == "act":
                on_act(line["name"], line["number"], line["total"])
        num_seen = len(told)
        if is_over:
            return False
        if should_stop():
            return None
        if time.monotonic() > deadline_s:
            return True
        time.sleep(POLL_S)


def _report(told: Told, exit_code: int, is_late: bool, log: Path, duration_s: float) -> Report:
    acts = {line["name"]: float(line["duration_s"]) for line in told if line["kind"] == "done"}
    planned: list[str] = next((line["acts"] for line in told if line["kind"] == "plan"), [])
    findings = [Finding(**line["finding"]) for line in told if line["kind"] == "finding"]
    cost: dict[str, Any] = next((line["cost"] for line in told if line["kind"] == "cost"), {})
    has_ended = any(line["kind"] == "end" for line in told)
    begun = [line["name"] for line in told if line["kind"] == "act"]
    if is_late:
        findings.append(_late(begun[-1] if begun else STARTING))
    elif not has_ended:
        findings.append(_died(begun[-1] if begun else STARTING, exit_code, log))
    left_out = tuple(act for act in planned if act not in acts)
    return Report(tuple(findings), acts, left_out, cost, round(duration_s, 2))


def _late(act: str) -> Finding:
    message = "rehearsal.max_s was over, this and what follows were left out; raise it to see more"
    return Finding("note", act, message)


def _died(act: str, exit_code: int, log: Path) -> Finding:
    """The child ended in the middle of an act, which nothing in Python can do."""
    said = " ".join(log.read_text(errors="replace").split())[-TAIL_CHARS:]
    how = f"exit code {exit_code}"
    hint = ""
    if exit_code < 0:
        how = signal.Signals(-exit_code).name
        hint = "; often the machine is short of memory" if exit_code == -signal.SIGKILL else ""
    message = f"the process of the rehearsal was ended by {how}{hint}; it said: {said or 'nothing'}"
    return Finding("error", act, message, may_pass=exit_code == -signal.SIGKILL)
