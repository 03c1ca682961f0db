"""Training's side of trackers: a process that is nudged, and never waited for while steps are done.

Nothing of a tracker's library is in the process that trains: it draws no random number there, takes
over no signal, and starts no thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping

from holdfast.training.configuration.schema import Json, TrackingConfig
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.progress import Progress
from holdfast.training.tracking.process import COMPLETED

logger = logging.getLogger(__name__)

LOG_NAME = "tracking.log"
MAX_LEAVING_S = 5.0
"""How long it is waited for by a process that leaves before its training has completed."""


class Trackers:
    """Sends what durable checkpoints cover, from ``start`` on, until ``close``."""

    def __init__(self, run: RunDirectory, config: TrackingConfig, progress: Progress) -> None:
        self.is_completed = False
        self._run, self._config, self._progress = run, config, progress
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, where the configuration names a tracker; else do nothing."""
        if not self._config.to:
            return
        asked = json.dumps({"to": self._config.to, "project": self._config.project})
        command = python_command("holdfast.training.tracking.process", str(self._run.path), asked)
        try:
            self._run.logs.mkdir(parents=True, exist_ok=True)
            with (self._run.logs / LOG_NAME).open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # signals to the terminal's group are not for it
                )
        except OSError as error:
            logger.warning("nothing is sent to trackers: %s", error)
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._progress.listeners.append(self._listen)

    def close(self) -> None:
        """Let the process send the rest; wait for that, longest where the training is complete."""
        process, self._process = self._process, None
        if process is None:
            return
        self._progress.listeners.remove(self._listen)
        if self.is_completed:
            _tell(process, f"{COMPLETED}\n")
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        wait_s = self._config.timeout_s
        try:
            code = process.wait(wait_s if self.is_completed else min(wait_s, MAX_LEAVING_S))
        except subprocess.TimeoutExpired:
            logger.warning("trackers have not got everything yet; another start sends the rest")
            return
        if code != 0:
            logger.warning("a tracker has failed, see %s", self._run.logs / LOG_NAME)

    def _listen(self, event: str, values: Mapping[str, Json]) -> None:  # noqa: ARG002
        if event == "saved" and self._process is not None:
            _tell(self._process, "saved\n")


@contextlib.contextmanager
def tracked(run: RunDirectory, config: TrackingConfig, progress: Progress) -> Iterator[Trackers]:
    """Trackers for the time of the block."""
    trackers = Trackers(run, config, progress)
    trackers.start()
    try:
        yield trackers
    finally:
        trackers.close()


def _tell(process: subprocess.Popen[bytes], line: str) -> None:
    """A pipe that is full holds nudges enough; one that is closed is told when it is waited for."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        os.write(process.stdin.fileno(), line.encode())
