"""A real Prefect server on loopback that tests can stop, kill and start again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SERVER_START_S = 180.0
SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    "PREFECT_CLI_COLORS": "false",
    "OMP_NUM_THREADS": "1",
    "HOLDFAST_REHEARSAL_DEPTH": "none",
}


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a process of the cluster; nothing of the caller's Prefect is inherited."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "HOLDFAST_"))}
    return {
        **kept,
        **SETTINGS,
        "PREFECT_HOME": str(home),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def make_template(path: Path) -> None:
    """A migrated SQLite database; copying it saves each server seconds of migrations."""
    home = path.parent / "template-home"
    home.mkdir(parents=True)
    script = (
        "import asyncio\n"
        "from prefect.server.database import provide_database_interface\n"
        "asyncio.run(provide_database_interface().create_db())\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], env=environment(home), check=True, capture_output=True
    )
    shutil.move(home / "prefect.db", path)


@dataclass
class Server:
    """A Prefect server on loopback that can be stopped, killed and started again."""

    home: Path
    port: int
    database_url: str | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        more = (
            {"PREFECT_API_DATABASE_CONNECTION_URL": self.database_url} if self.database_url else {}
        )
        argv = ["server", "start", "--host", "127.0.0.1", "--port", str(self.port), "--no-ui"]
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *argv],
                env=environment(self.home, **more),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._is_healthy, SERVER_START_S, "the server answers")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the server and wait for its end."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def _is_healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            with urllib.request.urlopen(f"{self.api_url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def log(self) -> str:
        return (self.home / "server.log").read_text(errors="replace")[-4000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    is_there: Callable[[], bool],
    timeout_s: float,
    what: str,
    tell: Callable[[], str] = lambda: "",
    every_s: float = 0.2,
) -> float:
    """Wait for something; how long it took. AssertionError with what is known where it doesn't."""
    start_s = time.monotonic()
    while not is_there():
        waited_s = time.monotonic() - start_s
        assert waited_s < timeout_s, f"not within {timeout_s:.0f} s: {what}\n{tell()}"
        time.sleep(every_s)
    return time.monotonic() - start_s
