"""Processes of ``python -m holdfast.training`` that have imported torch before they begin.

Most of a short segment's time is the import. Here one process imports, and forks for each segment:
a process of its own with its own pid, session, environment and streams, which runs ``main`` as
``__main__`` does, and is killed as any other. How a process starts from nothing is tried elsewhere
(tests/training/test_start_up.py, ``make chaos``).
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path

from holdfast.training.exactness.reproducibility import child_environment, python_command

_POLL_S = 0.01


class WarmProcess:
    """What ``subprocess.Popen`` is, as far as tests of segments need it."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path | None = None,
        script: Path | None = None,
        imported: tuple[str, ...] = (),
    ) -> None:
        """Start ``python -m holdfast.training``, or a script, in a session of its own.

        ``imported`` are further modules that it finds imported.
        """
        outputs = [os.pipe() for _ in range(3)]
        asked: dict[str, object] = {"arguments": [*arguments], "environment": {**environment}}
        asked["script"] = None if script is None else os.fspath(script)
        asked["folder"] = os.fspath(folder or Path.cwd())
        writing = [end for _, end in outputs]
        socket.send_fds(_server(imported), [json.dumps(asked).encode()], writing)
        for end in writing:
            os.close(end)
        (out, _), (err, _), (told, _) = outputs
        self.stdout = os.fdopen(out, encoding="utf-8")
        self.stderr = os.fdopen(err, encoding="utf-8")
        self._told = os.fdopen(told, encoding="utf-8")
        self.pid = int(self._told.readline())
        os.set_blocking(told, False)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process lives."""
        if self.returncode is None and (line := self._told.readline()):
            self.returncode = os.waitstatus_to_exitcode(int(line))
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end. Raises TimeoutExpired."""
        end_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end_s:
                raise subprocess.TimeoutExpired("holdfast.training", timeout)
            time.sleep(_POLL_S)
        self._told.close()
        return code

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end, and close the streams. What was written to them: output, errors."""
        with ThreadPoolExecutor(1) as reading, self.stdout, self.stderr:
            out = reading.submit(self.stdout.read)
            errors = self.stderr.read()
            self.wait(timeout)
            return out.result(), errors


@cache
def _server(imported: tuple[str, ...]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = subprocess.Popen(
        [*python_command("tests.warm_start"), str(theirs.fileno()), *imported],
        env=child_environment(1),
        pass_fds=[theirs.fileno()],
    )
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def _serve(asking: socket.socket) -> None:
    """Fork for each request, until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need no wait
    while True:
        message, streams, _, _ = socket.recv_fds(asking, 1 << 20, 3)
        if not message:
            return
        if os.fork() == 0:
            asking.close()
            _keep(json.loads(message), *streams)
        for stream in streams:
            os.close(stream)


def _keep(asked: Mapping[str, object], out: int, err: int, told: int) -> None:
    """Start the process, and tell its pid and how it ended."""
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pid = os.fork()
    if pid == 0:
        os.close(told)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        _run(asked)
    os.close(out)
    os.close(err)
    os.write(told, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(told, f"{status}\n".encode())
    os._exit(0)


def _run(asked: Mapping[str, object]) -> None:
    from holdfast.training.command_line import main
    from holdfast.training.preemption.signals import hold_signals

    os.setsid()
    environment, arguments = asked["environment"], asked["arguments"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(asked["folder"]))
    sys.argv[1:] = arguments
    if (script := asked["script"]) is not None:
        sys.argv[0] = str(script)
        sys.path.insert(0, str(Path(str(script)).parent))
        runpy.run_path(str(script), run_name="__main__")
        sys.exit()
    hold_signals()
    main(prog_name="python -m holdfast.training")


def _import(names: Sequence[str]) -> None:
    # What training and exports import when they need it.
    for name in ("onnxscript", "torch._dynamo", "torch.onnx", *names):  # onnxruntime starts threads
        import_module(name)
    import holdfast.training.bundles.stage
    import holdfast.training.champion.candidates
    import holdfast.training.champion.selection
    import holdfast.training.experiments
    import holdfast.training.loop.segment
    import holdfast.training.stages  # noqa: F401


if __name__ == "__main__":
    _import(sys.argv[2:])
    _serve(socket.socket(fileno=int(sys.argv[1])))
