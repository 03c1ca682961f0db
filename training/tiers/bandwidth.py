"""How fast a bucket takes bytes: measured, kept for the next run, limited where that is asked for.

The process that brings a run up measures; the one that trains reads the last measurement, and
decides from its own grace period how often it saves. Neither waits for the other.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from holdfast.training.errors import DataFormatError, InputError, StorageError
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import Limits, read_json, required_fields
from holdfast.training.storage.address import Address
from holdfast.training.tiers.scratch import address_of, store_folder

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "HOLDFAST_UPLOAD_LIMIT_MB_PER_S"
STOP_MARGIN_S = 6.0
"""Of a grace period: to finish a step, to save here, and to begin."""
LOOK_EVERY_S = 5.0
LOOK_AT_NEED_EVERY_S = 0.2
FILE = "bandwidth.json"
LIMITS = Limits(max_bytes=2**14, max_depth=2)
MEGABYTE = 1e6


def never() -> bool:
    """For what is needed until it is done."""
    return False


class Throttle:
    """Holds senders back, so that all together stay below a limit.

    Attributes:
        bytes_per_s: the limit; infinite for none, and once it was lifted.
    """

    def __init__(self, bytes_per_s: float = math.inf) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._mutex, self._is_lifted = threading.Lock(), threading.Event()

    def take(self, num_bytes: int, is_over: Callable[[], bool] = never) -> None:
        """Wait until so many bytes may be sent, or need not be sent any more."""
        if math.isinf(self.bytes_per_s):
            return
        with self._mutex:
            start_s = max(time.monotonic(), self._free_s)
            taken_s = num_bytes / self.bytes_per_s
            self._free_s = start_s + taken_s
        while (left_s := start_s - time.monotonic()) > 0 and not self._is_lifted.is_set():
            if is_over():
                with self._mutex:
                    self._free_s -= taken_s
                return
            self._is_lifted.wait(min(left_s, LOOK_AT_NEED_EVERY_S))

    def lift(self) -> None:
        """From now on there is no limit; whoever waits goes on."""
        self.bytes_per_s = math.inf
        self._is_lifted.set()


class Sending:
    """The bringing up that is under way: how much of it there is, and whether it is given up."""

    def __init__(self, num_bytes: int, throttle: Throttle) -> None:
        self.left_bytes = num_bytes
        self._throttle, self._mutex = throttle, threading.Lock()
        self._is_given_up = False

    def before_part(self, num_bytes: int, is_over: Callable[[], bool] = never) -> None:
        """For ``upload_file``: keeps to the limit.

        Raises StorageError once it is given up, or once the file ``is_over``.
        """
        self._throttle.take(num_bytes, is_over)
        with self._mutex:
            self.left_bytes -= num_bytes
        if self._is_given_up:
            raise StorageError("given up for a newer state, which this machine has time for")
        if is_over():
            raise StorageError("given up: another machine has brought it up")

    def give_up(self) -> None:
        """Let the next part that would be sent raise."""
        self._is_given_up = True


def asked_limit() -> Throttle:
    """The limit that the environment asks for. Raises InputError for what is no number above 0."""
    told = os.environ.get(LIMIT_VARIABLE, "")
    if not told:
        return Throttle()
    try:
        limit = float(told)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise InputError(f"{LIMIT_VARIABLE}={told[:40]!r}: expected a number above 0, as in 50")
    return Throttle(limit * MEGABYTE)


def note_bandwidth(address: Address, bytes_per_s: float) -> None:
    """Keep what was measured on this machine. Raises StorageError."""
    write_json_durably(store_folder(address) / FILE, {"bytes_per_s": bytes_per_s})


def known_bandwidth(address: Address) -> float | None:
    """What was measured last; None where nothing was, or it cannot be read."""
    path = store_folder(address) / FILE
    try:
        told = required_fields(read_json(path, LIMITS), path, {"bytes_per_s": (float,)})
    except (FileNotFoundError, DataFormatError, StorageError):
        return None
    speed = float(told["bytes_per_s"])
    return speed if speed > 0 else None


def fitting_bytes(bytes_per_s: float, grace_period_s: float) -> float:
    """How large a state can be that still goes up after a notice."""
    return bytes_per_s * max(0.0, grace_period_s - STOP_MARGIN_S)


class UploadPace:
    """How often a run saves so that its bucket is never far behind.

    A state that goes up within the grace period needs nothing: the notice's own save goes up. Of a
    larger one, what counts after a notice is the last that went up before; so a new one is saved
    whenever the bucket can have taken the one before.
    """

    def __init__(
        self,
        run: RunDirectory,
        grace_period_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """For a run in a folder it has nothing to say."""
        self._run, self._grace_period_s, self._clock = run, grace_period_s, clock
        self._address = address_of(run.path.parent.parent)
        self._looked_s = -math.inf
        self._speed: float | None = None
        self._num_bytes = 0
        self._is_told = False
        if self._address is not None and (speed := known_bandwidth(self._address)) is not None:
            logger.info("%s", _told_fit(self._address, speed, grace_period_s))

    def note_saved(self, step: int) -> None:
        """A full checkpoint of this step is on the scratch disk."""
        if self._address is not None:
            self._num_bytes = folder_bytes(self._run.checkpoint(step))

    @property
    def upload_s(self) -> float:
        """Seconds that a checkpoint takes on its way up where they are too many; else infinite."""
        if self._address is None:
            return math.inf
        if self._clock() - self._looked_s >= LOOK_EVERY_S:
            self._looked_s, self._speed = self._clock(), known_bandwidth(self._address)
        if self._speed is None:
            return math.inf
        if self._num_bytes <= fitting_bytes(self._speed, self._grace_period_s):
            return math.inf
        self._tell_once(self._speed)
        return self._num_bytes / self._speed

    def _tell_once(self, speed: float) -> None:
        if self._is_told:
            return
        self._is_told = True
        assert self._address is not None
        logger.warning(
            "%s, and a checkpoint has %s, which takes %.0f s: a notice costs the steps since the "
            "last one that went up, so checkpoints are saved, and go up, as often as that lasts "
            "(within checkpoint.max_overhead, and unless checkpoint.is_auto is false)",
            _told_fit(self._address, speed, self._grace_period_s),
            told_size(self._num_bytes),
            self._num_bytes / speed,
        )


def _told_fit(address: Address, speed: float, grace_period_s: float) -> str:
    return (
        f"{address} takes {speed / 2**20:.1f} MiB/s; a grace period of {grace_period_s:g} s is "
        f"enough for {told_size(fitting_bytes(speed, grace_period_s))}"
    )


def told_size(num_bytes: float) -> str:
    """A size for people."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take; 0 where it is gone meanwhile."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0
