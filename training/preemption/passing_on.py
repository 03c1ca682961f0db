"""Signals that come to a process which waits for another one are for that one."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


def run_passing_on(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    *,
    stdin: int | None = None,
    stdout: int | IO[str] | None = None,
) -> int:
    """Run a program with this terminal, and wait for its end. Returns its exit code.

    SIGTERM and SIGUSR1 are passed on. Ctrl-C reaches it by the terminal, and is its own matter. To
    be called in the main thread.
    """
    with (
        subprocess.Popen(
            command, env=environment, cwd=folder, stdin=stdin, stdout=stdout
        ) as process,
        _passing_on_to(process),
    ):
        return process.wait()


@contextmanager
def _passing_on_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        process.send_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
