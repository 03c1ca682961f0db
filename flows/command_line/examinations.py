"""What ``holdfast doctor`` looks at, one function each."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from holdfast.tasks.preflight import require_writable
from holdfast.training.errors import HoldfastError
from holdfast.training.machines.addresses import listening_socket, own_address, require_reachable
from holdfast.training.machines.note import FolderBoard, board_in
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.probe import probe, server_time_s
from holdfast.training.storage.protocol import PART_BYTES
from holdfast.training.tiers.bandwidth import fitting_bytes, note_bandwidth, told_size
from holdfast.training.tiers.scratch import address_of

PROBE_BYTES = 64 * 2**20
MAX_CLOCK_DIFFERENCE_S = 5.0
MAX_NOTES = 20
LOW_FREE_BYTES = 2 * 2**30
PROBING = "holdfast.training.distributed.probing"
MACHINES_VARIABLES = ("MASTER_ADDR", "WORLD_SIZE", "RANK")
"""By which torchrun and others tell a process its place, and which a segment does not read."""


@dataclass(frozen=True)
class Finding:
    """What one examination found.

    Attributes:
        subject: what was looked at.
        verdict: ``bad`` keeps runs from working; ``warning`` is worth knowing.
        detail: what was found, and what to do about it.
    """

    subject: str
    verdict: Literal["good", "warning", "bad"]
    detail: str


def examine_versions(_store: Path, _grace_period_s: float) -> Finding:
    """Python and the libraries against what this version of Holdfast asks for."""
    from packaging.requirements import Requirement

    wrong = []
    for text in metadata.requires("holdfast") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} is not {wanted.specifier}")
    if wrong:
        return Finding("versions", "bad", "; ".join(wrong) + "; install with constraints.txt")
    shown = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("holdfast", "torch", "prefect")
    )
    return Finding("versions", "good", f"Python {platform.python_version()}, {shown}")


def examine_store(store: Path, _grace_period_s: float) -> Finding:
    """Whether the store can be written, and how much room there is."""
    try:
        require_writable(store)
    except HoldfastError as error:
        return Finding("store", "bad", str(error))
    free_bytes = shutil.disk_usage(store).free
    detail = f"{store} is writable, {free_bytes / 2**30:.1f} GiB free"
    if free_bytes < LOW_FREE_BYTES:
        return Finding("store", "warning", f"{detail}; a full disk stops saving")
    return Finding("store", "good", detail)


def examine_save_time(store: Path, grace_period_s: float) -> Finding:
    """How fast bytes become durable in the store, against the grace period."""
    probe = store / f".speed-{secrets.token_hex(6)}"
    try:
        start_s = time.monotonic()
        with probe.open("xb") as stream:
            stream.write(os.urandom(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        duration_s = time.monotonic() - start_s
    except OSError as error:
        return Finding("saving", "bad", f"{store} cannot be written: {error.strerror}")
    finally:
        with suppress(OSError):  # what could not be written need not be removed
            probe.unlink()
    speed = PROBE_BYTES / duration_s
    # Half the grace period: a step has to be finished first, and others may be writing, too.
    fitting_bytes = speed * grace_period_s / 2
    detail = (
        f"{speed / 2**20:.0f} MiB/s durable; a grace period of {grace_period_s:g} s is enough for "
        f"{fitting_bytes / 2**30:.1f} GiB of state"
    )
    return Finding("saving", "warning" if fitting_bytes < 2**30 else "good", detail)


def examine_bucket(store: Path, grace_period_s: float) -> Finding:
    """Whether a bucket does what a writer needs, and what fits into a grace period."""
    address = address_of(store)
    assert address is not None
    key = f"probe/{secrets.token_hex(8)}.bin"
    try:
        bucket = open_store(address)
        if wrong := probe(bucket):
            return Finding("bucket", "bad", f"{address} is not fit for writing runs: {wrong[0]}")
        start_s = time.monotonic()
        parts = [os.urandom(PART_BYTES) for _ in range(PROBE_BYTES // PART_BYTES)]
        bucket.upload(key, parts)
        duration_s = time.monotonic() - start_s
        bucket.delete([key])
        note_bandwidth(address, PROBE_BYTES / duration_s)
    except HoldfastError as error:
        return Finding("bucket", "bad", str(error))
    speed = PROBE_BYTES / duration_s
    fitting = fitting_bytes(speed, grace_period_s)
    detail = (
        f"{address} keeps conditions; {speed / 2**20:.0f} MiB/s up; a grace period of "
        f"{grace_period_s:g} s is enough for {told_size(fitting)} of state; a larger one is saved "
        "and brought up as often as that lasts, and after a notice the last one that is up counts"
    )
    return Finding("bucket", "warning" if fitting < 2**30 else "good", detail)


def examine_bucket_clock(store: Path, _grace_period_s: float) -> Finding:
    """This machine's clock against that of the bucket's server."""
    address = address_of(store)
    assert address is not None
    before_s = time.time()
    try:
        there_s = server_time_s(open_store(address))
    except HoldfastError as error:
        return Finding("bucket's clock", "warning", f"not compared with this machine's: {error}")
    # It may be any moment of the request, and is told in whole seconds.
    difference_s = max(0.0, before_s - there_s - 1.0, there_s - time.time())
    if difference_s > MAX_CLOCK_DIFFERENCE_S:
        detail = (
            f"differs from this machine's by {difference_s:.0f} s; let NTP set this one: a server "
            "refuses requests that are 15 minutes off, and the first `holdfast status` may take "
            "for dead who lives"
        )
        return Finding("bucket's clock", "warning", detail)
    return Finding(
        "bucket's clock", "good", f"agrees with this machine's within {MAX_CLOCK_DIFFERENCE_S:g} s"
    )


def examine_server(_store: Path, _grace_period_s: float) -> Finding:
    """The Prefect server, and this machine's clock against its."""
    from holdfast.flows.fleet.server import configured_api_url, server_time

    api_url = configured_api_url()
    if api_url is None:
        detail = "none configured; each `holdfast run` starts a temporary one"
        return Finding("Prefect server", "good", detail)
    try:
        there_s = server_time(api_url)
    except HoldfastError as error:
        return Finding("Prefect server", "bad", str(error))
    difference_s = abs(time.time() - there_s) if there_s is not None else 0.0
    if difference_s > MAX_CLOCK_DIFFERENCE_S:
        detail = f"{api_url} has a clock that differs by {difference_s:.0f} s; let NTP set both"
        return Finding("Prefect server", "warning", detail)
    return Finding("Prefect server", "good", f"{api_url} answers, and its clock agrees")


def examine_clock(store: Path, _grace_period_s: float) -> Finding:
    """This machine's clock against that of the store's file system."""
    probe = store / f".clock-{secrets.token_hex(6)}"
    try:
        probe.touch(exist_ok=False)
        difference_s = abs(probe.stat().st_mtime - time.time())
    except OSError as error:
        return Finding("clock", "warning", f"not compared with the store's: {error.strerror}")
    finally:
        with suppress(OSError):  # what could not be written need not be removed
            probe.unlink()
    if difference_s > MAX_CLOCK_DIFFERENCE_S:
        detail = f"differs from the store's by {difference_s:.0f} s; let NTP set both"
        return Finding("clock", "warning", f"{detail}: leases would end too early or too late")
    return Finding("clock", "good", f"agrees with the store's within {difference_s:.1f} s")


@cache
def _asked_of_torch() -> dict[str, Any] | str:
    """What torch says of this machine, in a process of its own; or why it does not start."""
    asked = subprocess.run(
        [sys.executable, "-P", "-m", PROBING], capture_output=True, text=True, check=False
    )
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines() or ["no message"]
        return lines[-1]
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    return found


def examine_gpu(_store: Path, _grace_period_s: float) -> Finding:
    """Whether torch sees a GPU."""
    found = _asked_of_torch()
    if isinstance(found, str):
        return Finding("torch", "bad", f"does not start: {found}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = ", ".join(found["gpus"])
    return Finding("torch", "good", f"GPU {names}" if names else f"no GPU; {cores} CPU cores")


def examine_processes(_store: Path, _grace_period_s: float) -> Finding:
    """Whether processes of this machine can train together, and how fast they sum."""
    subject, found = "processes", _asked_of_torch()
    if isinstance(found, str):
        return Finding(subject, "warning", "not tried: torch does not start")
    if "cpu_problem" in found:
        return Finding(
            subject,
            "warning",
            f"two of this machine cannot train together ({found['cpu_problem']}): "
            f"distributed.num_processes must be 1 until 127.0.0.1 can be reached",
        )
    sum_s, num_bytes = found["cpu_sum_s"], found["sum_bytes"]
    told = f"two meet, and sum {num_bytes / 2**20:.0f} MiB in {sum_s * 1000:.0f} ms"
    if "cuda_problem" in found:
        return Finding(
            subject,
            "warning",
            f"{told}; on two GPUs they cannot ({found['cuda_problem']}): train with "
            f"distributed.num_processes=1 or train.device=cpu until NCCL can sum",
        )
    if "cuda_sum_s" in found:
        told += f", on two GPUs by NCCL in {found['cuda_sum_s'] * 1000:.1f} ms"
    if found["apart"]:
        pairs = ", ".join(f"{one} and {other}" for one, other in found["apart"])
        told += f"; without access to each other's memory, so slower: GPUs {pairs}"
    set_here = [name for name in MACHINES_VARIABLES if name in os.environ]
    if set_here:
        return Finding(
            subject,
            "warning",
            f"{told}; {', '.join(set_here)} of torchrun or a cluster is set and not read: a "
            f"segment starts its own processes, and `holdfast join` brings other machines in",
        )
    return Finding(subject, "good", told)


def examine_machines(store: Path, _grace_period_s: float) -> Finding:
    """Where other machines come to this one, and whether it comes to where runs meet now."""
    subject, address = "machines", address_of(store)
    try:
        own = own_address()
        with listening_socket(own) as listener:
            require_reachable(*listener.getsockname())
        board = FolderBoard(store) if address is None else board_in(address)
        notes = filter(None, map(board.read, board.names()[:MAX_NOTES]))
        meetings = [note for note in notes if note.state == "open"]
    except HoldfastError as error:
        return Finding(subject, "warning", f"not fit for runs of several machines: {error}")
    told = f"others come to {own.host} ({own.interface or 'of no known interface'})"
    for note in meetings:
        try:
            require_reachable(note.host, note.port)
        except HoldfastError as error:
            return Finding(subject, "warning", f"{told}; {note.name}: {error}")
        told += f"; {note.name} meets at {note.host}:{note.port}, which answers"
    return Finding(subject, "good", told)


EXAMINATIONS: tuple[Callable[[Path, float], Finding], ...] = (
    examine_versions,
    examine_store,
    examine_save_time,
    examine_clock,
    examine_server,
    examine_gpu,
    examine_processes,
    examine_machines,
)
OF_BUCKETS = (examine_bucket, examine_bucket_clock)
