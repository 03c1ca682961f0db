"""A process beside a training script that keeps its run in a bucket.

The script's own process makes no call to a bucket: its signals are answered at once, and its loader
processes may be forked. The companion is the run's writer in the bucket from before the script's
first step until the script has ended, however it ends; then it brings up what is saved, and leaves.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable

import click

from holdfast.training.errors import HoldfastError, InputError, LeaseHeldError, StorageError
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.preemption.signals import NOTICE_SIGNALS
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import parse_address
from holdfast.training.tiers.keeping import END_PATIENCE_S, GRACE_S, opened_replica
from holdfast.training.tiers.replica import Replica
from holdfast.training.tiers.scratch import tier_folder

COMMAND = "keep-up"
EXIT_CODES = "Exit codes: 0 the bucket has what is saved, 1 it cannot be reached, 2 wrong input."
LOOK_EVERY_S = 1.0
WAIT_S = 60.0
"""For the companion of the start before, which brings up what that one saved."""
ERRORS: tuple[type[HoldfastError], ...] = (InputError, LeaseHeldError, StorageError)


class Companion:
    """The other process, as the script sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    def start(cls, store: str, name: str) -> Companion:
        """Start one, and wait until the run's folder is what the bucket has.

        Raises InputError, LeaseHeldError or StorageError, as ``opened_replica`` does there.
        """
        command = python_command("holdfast.training", COMMAND, "--store", store, "--name", name)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is the script's
        )
        companion = cls(process)
        companion._require(companion._told())
        return companion

    def finish(self) -> StorageError | None:
        """Wait until the bucket has what is saved; what is wrong where it does not."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        error = self._told().get("error")
        self._process.wait()
        return StorageError(error) if error else None

    def _told(self) -> dict[str, str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        lost = "the process that keeps the run in its bucket has ended; its messages say why"
        told: dict[str, str] = json.loads(line) if line.strip() else {"error": lost}
        return told

    def _require(self, told: dict[str, str]) -> None:
        if "error" not in told:
            return
        self._process.wait()
        kind = next((one for one in ERRORS if one.__name__ == told.get("type")), StorageError)
        raise kind(told["error"])


@click.command(COMMAND, hidden=True, epilog=EXIT_CODES)
@click.option("--store", required=True, help="The bucket's address.")
@click.option("--name", required=True, help="EXPERIMENT/RUN-ID.")
def keep_up_command(store: str, name: str) -> None:
    """Keep a run in its bucket until the process that started this one ends."""
    parent = os.getppid()
    for number in NOTICE_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the script's end is ours
    run = RunDirectory(tier_folder(parse_address(store), "work") / name)
    try:
        with opened_replica(run, wait_s=WAIT_S, can_begin_early=True, tell=_warn) as replica:
            assert replica is not None
            replica.start()
            _tell({})
            _wait_for_end(lambda: os.getppid() != parent)
            _finish(replica, run)
    except HoldfastError as error:
        _tell({"error": str(error), "type": type(error).__name__})
        sys.exit(error.exit_code)
    _tell({})


def _wait_for_end(is_orphan: Callable[[], bool]) -> None:
    """Until the script closes its end, or is gone: a process that it forked may hold it open."""
    while not is_orphan():
        ready, _, _ = select.select([sys.stdin], [], [], LOOK_EVERY_S)
        if ready and not sys.stdin.readline():
            return


def _finish(replica: Replica, run: RunDirectory) -> None:
    """Bring up the end. After a notice or an error there is no time for long."""
    segments = read_segments(run)
    if not segments or segments[-1].outcome == "completed":
        replica.finish(END_PATIENCE_S)
        return
    try:
        replica.finish(GRACE_S, is_urgent=True)
    except StorageError as error:
        _warn(str(error))


def _warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


def _tell(told: dict[str, str]) -> None:
    try:
        print(json.dumps(told), flush=True)
    except BrokenPipeError:
        sys.stdout = None  # nobody is left to be told
