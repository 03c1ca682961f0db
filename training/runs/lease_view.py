"""Who writes a run: what anybody can read of its lease. Imports next to nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from holdfast.training.errors import DataFormatError, StorageError
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.process_identity import ProcessIdentity, current_process, presence
from holdfast.training.runs.shown_text import shown
from holdfast.training.runs.stored_json import Kinds, Limits, read_json, required_fields

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import Json

FORMAT_VERSION = 1
LEASE_NAME = re.compile(r"([0-9]{8,15})\.json")
LIMITS = Limits(max_bytes=2**16, max_depth=4)
UNREADABLE_TTL_S = 60.0
MAX_TTL_S = 24 * 3600.0
MAX_HOST_CHARS = 255
MAX_PID = 2**31 - 1
MAX_UNIX_S = 32503680000.0  # the year 3000
FIELDS: Kinds = {
    "host": (str,),
    "boot_id": (str,),
    "pid_namespace": (str,),
    "pid": (int,),
    "pid_start": (int,),
    "token": (str,),
    "ttl_s": (float,),
    "acquired_at": (float,),
    "released_at": (float, type(None)),
}
UNKNOWN = ProcessIdentity(host="?", boot_id="", pid_namespace="", pid=0, pid_start=0)

Status = Literal["held", "released", "gone", "overdue"]


@dataclass(frozen=True)
class LeaseView:
    """The newest lease of a run, as it was when it was read.

    Attributes:
        generation: how many holders the run has had.
        token: random name of the holder.
        process: the holder.
        acquired_at: when it became the writer, Unix time.
        renewed_at: when it was last heard of, Unix time.
        ttl_s: after this many seconds without a renewal it is presumed dead.
        age_s: seconds since the last renewal.
        status: ``held``; ``released`` by its holder; ``gone``: its process does not exist any
            more; ``overdue``: not renewed for ``ttl_s``.
    """

    generation: int
    token: str
    process: ProcessIdentity
    acquired_at: float
    renewed_at: float
    ttl_s: float
    age_s: float
    status: Status

    @property
    def is_expired(self) -> bool:
        """Whether another segment may take over now."""
        return self.status != "held"

    @property
    def holder(self) -> str:
        """The holder in words, e.g. ``process 4711 on node-3``."""
        return f"process {self.process.pid} on {shown(self.process.host, MAX_HOST_CHARS)}"

    def refusal(self, run: RunDirectory) -> str:
        """Why a second segment may not begin: who writes, since when, and until when."""
        return (
            f"{run.path} is being written by {self.holder} since {_clock(self.acquired_at)}, last "
            f"heard of {self.age_s:.1f} s ago; its lease ends at "
            f"{_clock(self.renewed_at + self.ttl_s)} unless it is renewed: wait, or stop that "
            f"process"
        )


def generation_path(run: RunDirectory, generation: int) -> Path:
    """The lease file of a generation."""
    return run.lease / f"{generation:08d}.json"


def newest_generation(run: RunDirectory) -> int:
    """The highest generation that was ever taken; 0 for none. Raises StorageError."""
    try:
        return newest_among(path.name for path in run.lease.iterdir())
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise storage_error("list", run.lease, error) from error


def newest_among(names: Iterable[str]) -> int:
    """The highest generation that one of these files is of; 0 for none."""
    found = map(LEASE_NAME.fullmatch, names)
    return max((int(match[1]) for match in found if match is not None), default=0)


def read_lease(run: RunDirectory, here: ProcessIdentity | None = None) -> LeaseView | None:
    """The newest lease of a run, or None if it never had one.

    A lease file that is not readable as such, or holds what no holder writes, counts as held until
    it is a minute old.

    Args:
        run: the run.
        here: who looks; this process, unless a test plays another machine.

    Raises:
        StorageError: the disk does not answer.
    """
    generation = newest_generation(run)
    if generation == 0:
        return None
    path = generation_path(run, generation)
    try:
        renewed_at = path.lstat().st_mtime
        return lease_at(path, lambda path: read_json(path, LIMITS), renewed_at, here)
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except OSError as error:
        raise storage_error("read", path, error) from error


def lease_at(
    path: Path,
    read: Callable[[Path], Json],
    renewed_at: float,
    here: ProcessIdentity | None = None,
) -> LeaseView:
    """As ``read_lease``, of a lease file whose content ``read`` gives."""
    try:
        content = _checked(read(path), path)
    except DataFormatError:
        content = None
    return _view(newest_among([path.name]), content, renewed_at, here or current_process())


def _checked(value: Json, path: Path) -> dict[str, Any]:
    """The fields of a lease that a holder can have written. Raises DataFormatError."""
    content = required_fields(value, path, FIELDS)
    limits = {
        "pid": (1, MAX_PID),
        "pid_start": (0, 2**63),
        "ttl_s": (0, MAX_TTL_S),
        "acquired_at": (0, MAX_UNIX_S),
    }
    for name, (least, most) in limits.items():
        if not least <= content[name] <= most:
            raise DataFormatError(
                f"{path}: {name} is {content[name]!r:.40}, expected {least} to {most:g}"
            )
    return content


def _view(
    generation: int, content: dict[str, Any] | None, renewed_at: float, here: ProcessIdentity
) -> LeaseView:
    process, token, ttl_s = UNKNOWN, "?", UNREADABLE_TTL_S
    acquired_at, is_released = renewed_at, False
    if content is not None:
        process = ProcessIdentity(**{entry.name: content[entry.name] for entry in fields(UNKNOWN)})
        token, ttl_s = content["token"], float(content["ttl_s"])
        acquired_at, is_released = float(content["acquired_at"]), content["released_at"] is not None
    age_s = time.time() - renewed_at
    status: Status = "held"
    if is_released:
        status = "released"
    elif presence(process, here) == "gone":
        status = "gone"
    elif age_s > ttl_s:
        status = "overdue"
    return LeaseView(generation, token, process, acquired_at, renewed_at, ttl_s, age_s, status)


def _clock(unix_s: float) -> str:
    known_s = min(max(unix_s, 0.0), MAX_UNIX_S)  # a file's time may be anything
    return datetime.fromtimestamp(known_s, UTC).isoformat(timespec="seconds")
