"""The lease of a run: at most one segment writes, whatever is killed, stopped or cut off when.

Each holder owns a generation. ``lease/<generation>.json`` is made by ``link()``, which succeeds for
one contender only; its content never changes, its modification time is the last renewal (setting
it needs no disk space). The highest generation is the holder. The files of earlier holders stay,
so that no generation can ever be taken twice.

Safety does not depend on clocks, but on fencing. A contender first makes a staging folder of its
own, ``.staging/<generation>-<token>/``; everything that a holder changes in the run it changes by
a rename out of, or into, that folder. The winner renames the staging folders of all earlier
generations away before ``acquire`` returns. A holder that was stopped and wakes up later gets
ENOENT from each of its renames and each new file: it changes nothing, and ``check`` tells it why.
Therefore nobody may make missing parents (``mkdir(parents=True)``) below ``staging``.

What lies in a staging folder is deleted with it, but for ``set-aside``: a damaged checkpoint goes
through there to its other name, and where its holder ends on the way, the next one takes it there.

Clocks only decide when a holder is presumed dead: at once, where its process is seen to be gone;
otherwise when it has not renewed for ``ttl_s``.

This module imports the standard library and small modules of its own kind alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import stat
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from holdfast.training.errors import LeaseHeldError, LeaseLostError, StorageError
from holdfast.training.runs.durable_json import (
    json_bytes,
    storage_error,
    sync_folder,
    without_links,
)
from holdfast.training.runs.lease_view import (
    FORMAT_VERSION,
    LeaseView,
    generation_path,
    newest_generation,
    read_lease,
)
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.process_identity import ProcessIdentity, current_process

__all__ = ["Lease", "LeaseView", "read_lease"]

logger = logging.getLogger(__name__)

RENEWALS_PER_TTL = 8
RETRY_S = 0.2
CONTENT_NAME = "lease.json"
SET_ASIDE = "set-aside"
"""Folder within ``staging`` in which a checkpoint waits on its way to another name."""
FENCED_PREFIX = "fenced-"
STAGING_NAME = re.compile(r"([0-9]{8,15})-[0-9a-f]{16}")
FENCED_NAME = re.compile(rf"{FENCED_PREFIX}{STAGING_NAME.pattern}-[0-9a-f]{{16}}")
MAX_GENERATION = 10**12


class Lease:
    """The right to write one run, held by this process.

    Attributes:
        generation: number of this holder among all that the run had.
        staging: folder for everything that is being written; it vanishes with the lease.
    """

    generation: int
    staging: Path

    def __init__(
        self,
        run: RunDirectory,
        ttl_s: float,
        identity: ProcessIdentity,
        *,
        generation: int,
        token: str,
    ) -> None:
        """For ``acquire``, which is how a lease is taken."""
        self.generation = generation
        self.staging = run.staging / f"{generation:08d}-{token}"
        self.token = token
        self._run = run
        self._ttl_s = ttl_s
        self._identity = identity
        self._path = generation_path(run, generation)
        self._acquired_at = time.time()
        self._renewed_s = time.monotonic()
        self._lost: str | None = None
        self._renewal_error: StorageError | None = None
        self._should_stop = threading.Event()
        self._thread = threading.Thread(
            target=self._renew_until_stopped, name="holdfast-lease", daemon=True
        )

    @classmethod
    def acquire(
        cls,
        run: RunDirectory,
        ttl_s: float,
        *,
        wait_s: float = 0.0,
        identity: ProcessIdentity | None = None,
    ) -> Lease:
        """Become the one writer of the run.

        After return every earlier holder is fenced off, and a thread renews the lease.

        Args:
            run: the run; its folder is made where it is missing.
            ttl_s: without a renewal for this long, another segment may take over.
            wait_s: how long to wait for a holder that may be dead, but is not yet presumed so.
            identity: who asks; this process, unless a test plays another machine.

        Raises:
            LeaseHeldError: another segment writes this run; the message says which one and when
                its lease ends.
            StorageError: the run directory cannot be written.
        """
        deadline_s = time.monotonic() + wait_s
        while True:
            try:
                return cls._acquire_once(run, ttl_s, identity or current_process())
            except LeaseHeldError:
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    raise
                time.sleep(min(RETRY_S, remaining_s))

    @classmethod
    def _acquire_once(cls, run: RunDirectory, ttl_s: float, identity: ProcessIdentity) -> Lease:
        held = read_lease(run, identity)
        if held is not None and not (held.is_expired or _is_stuck_in_the_future(run, held)):
            raise LeaseHeldError(held.refusal(run))
        generation = newest_generation(run) + 1 if held is None else held.generation + 1
        if generation > MAX_GENERATION:
            raise StorageError(
                f"{generation_path(run, generation - 1)} would be of writer {generation - 1:,} of "
                f"this run, which it cannot have had; it was not made by Holdfast: move it away"
            )
        lease = cls(run, ttl_s, identity, generation=generation, token=secrets.token_hex(8))
        lease._claim()
        try:
            lease._fence_others()
            lease._renew()
            lease._thread.start()
            lease.check()
        except BaseException:
            lease.release()
            raise
        return lease

    def check(self) -> None:
        """Make sure that this process is still the writer.

        Costs three looks at file names. To be called before each commit; the commit itself is
        safe because it is a rename out of ``staging``.

        Raises:
            LeaseLostError: another segment took over, the lease was released, or it could not be
                renewed for ``ttl_s``.
            StorageError: the run directory cannot be read.
        """
        if self._lost is None:
            self._lost = self._find_loss()
        if self._lost is not None:
            raise LeaseLostError(
                f"this segment no longer writes {self._run.path}: {self._lost}; nothing was "
                f"changed since, and the run can be continued by starting it again"
            ) from self._renewal_error
        if not self._thread.is_alive():
            raise LeaseLostError(
                f"the lease of {self._run.path} is no longer renewed: its thread has ended; "
                f"start the run again"
            )
        if time.monotonic() - self._renewed_s > self._ttl_s / 2:
            # A process that slept is late without fault. Nobody took over, so it may go on.
            self._try_to_renew()

    def release(self) -> None:
        """Let the next segment begin at once. Never raises; calling it again does nothing.

        Staged files are deleted. Where the mark cannot be written the lease simply runs out.
        """
        if self._should_stop.is_set():
            return
        self._should_stop.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._lost = self._lost or "the lease was released"
        with contextlib.suppress(OSError):
            self._write_content(released_at=time.time())
            (self.staging / CONTENT_NAME).replace(self._path)
        _delete_staging(self._run, self.staging)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _claim(self) -> None:
        """Make the staging folder, then the generation; LeaseHeldError if another was faster."""
        _require_own_folders(self._run)
        try:
            self._run.lease.mkdir(parents=True, exist_ok=True)
            self._run.staging.mkdir(exist_ok=True)
            self.staging.mkdir()
        except OSError as error:
            raise storage_error("take the lease in", self._run.lease, error) from error
        content = self.staging / CONTENT_NAME
        try:
            self._write_content(released_at=None)
            os.link(content, self._path)
        except (FileExistsError, FileNotFoundError):
            # Not found: a faster contender has taken our staging folder away by now.
            # Over a network the answer to a link that succeeded can get lost and be repeated.
            if not _is_same_file(content, self._path):
                self._give_up_claim()
        except OSError as error:
            shutil.rmtree(self.staging, ignore_errors=True)
            failed = storage_error("take the lease in", self._run.lease, error)
            raise without_links(self._run.path, error) or failed from error
        # Content is never rewritten in place: the release mark will be a new file.
        content.unlink(missing_ok=True)

    def _give_up_claim(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        winner = read_lease(self._run, self._identity)
        raise LeaseHeldError(
            winner.refusal(self._run)
            if winner is not None
            else f"another segment took the lease of {self._run.path} just now; try again"
        )

    def _fence_others(self) -> None:
        """Take the staging folders of all earlier generations away, then delete them."""
        try:
            sync_folder(self._run.lease)
            for name in _names(self._run.staging):
                if self._is_outdated(name):
                    fenced = f"{FENCED_PREFIX}{name}-{self.token}"
                    with contextlib.suppress(FileNotFoundError):
                        (self._run.staging / name).rename(self._run.staging / fenced)
            sync_folder(self._run.staging)
            fenced_names = _names(self._run.staging)
        except OSError as error:
            raise storage_error("fence off the last writer in", self._run.staging, error) from error
        for name in fenced_names:
            if FENCED_NAME.fullmatch(name):
                _delete_staging(self._run, self._run.staging / name)

    def _is_outdated(self, name: str) -> bool:
        found = STAGING_NAME.fullmatch(name)
        return found is not None and int(found[1]) <= self.generation and name != self.staging.name

    def _find_loss(self) -> str | None:
        """Why this process is no longer the writer, or None."""
        try:
            if _exists(generation_path(self._run, self.generation + 1)):
                return self._describe_winner()
            if not _exists(self._path) or not _exists(self.staging):
                return f"{self._path} or {self.staging} was deleted"
        except OSError as error:
            raise storage_error("check the lease in", self._run.lease, error) from error
        return None

    def _describe_winner(self) -> str:
        winner = read_lease(self._run, self._identity)
        who = winner.holder if winner is not None else "another segment"
        return f"{who} took over from generation {self.generation}"

    def _renew(self) -> None:
        """Move the time of the last renewal to now. Raises StorageError."""
        now_ns = time.time_ns()
        try:
            os.utime(self._path, ns=(now_ns, now_ns))
        except OSError as error:
            raise storage_error("renew the lease", self._path, error) from error
        self._renewed_s = time.monotonic()

    def _try_to_renew(self) -> None:
        try:
            self._renew()
            self._renewal_error = None
        except StorageError as error:
            self._renewal_error = error
            unrenewed_s = time.monotonic() - self._renewed_s
            if unrenewed_s > self._ttl_s:
                self._lost = f"its lease could not be renewed for {unrenewed_s:.1f} s ({error})"
                self.check()

    def _renew_until_stopped(self) -> None:
        while not self._should_stop.wait(self._ttl_s / RENEWALS_PER_TTL):
            if not self._is_renewed():
                return

    def _is_renewed(self) -> bool:
        """Renew once; whether this process may still be the writer."""
        try:
            self._lost = self._lost or self._find_loss()
            if self._lost is not None:
                return False
            self._try_to_renew()
        except LeaseLostError:
            return False
        except StorageError as error:
            self._renewal_error = error
        return True

    def _write_content(self, released_at: float | None) -> None:
        content = json_bytes(
            {
                **asdict(self._identity),
                "format_version": FORMAT_VERSION,
                "generation": self.generation,
                "token": self.token,
                "ttl_s": self._ttl_s,
                "acquired_at": self._acquired_at,
                "released_at": released_at,
            }
        )
        with (self.staging / CONTENT_NAME).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _is_stuck_in_the_future(run: RunDirectory, held: LeaseView) -> bool:
    """Whether a lease whose last renewal lies ahead of our clock stays unrenewed for its ttl.

    Without this, a machine whose clock was an hour fast would hold its lease for an hour.
    """
    if held.age_s > -held.ttl_s:
        return False
    time.sleep(held.ttl_s)
    later = read_lease(run)
    return later is not None and (later.generation, later.renewed_at) == (
        held.generation,
        held.renewed_at,
    )


def _require_own_folders(run: RunDirectory) -> None:
    """Raise StorageError where a folder of the run is a link: nothing is changed behind one."""
    own = (run.lease, run.staging, run.checkpoints, run.candidates, run.segments, run.logs)
    for path in (*own, run.bundle, run.tensorboard, run.tracking):
        try:
            is_link = stat.S_ISLNK(path.lstat().st_mode)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise storage_error("look at", path, error) from error
        if is_link:
            raise StorageError(
                f"{path} is a link, expected a folder of the run's own: nothing is written or "
                f"deleted behind a link; put the folder itself there"
            )


def _delete_staging(run: RunDirectory, folder: Path) -> None:
    """Delete what a holder left; a checkpoint that it was setting aside gets to its name first.

    What cannot be deleted is no danger any more; the next holder tries again.
    """
    try:
        _put_back(run, folder / SET_ASIDE)
    except OSError as error:
        logger.warning("left for the next writer: %s: %s", folder / SET_ASIDE, error)
        return
    shutil.rmtree(folder, ignore_errors=True)


def _put_back(run: RunDirectory, waiting: Path) -> None:
    for name in _names(waiting) if _exists(waiting) else []:
        target = run.checkpoints / name
        if _exists(target):
            target = target.with_name(f"{name}-{secrets.token_hex(4)}")
        try:
            (waiting / name).rename(target)
        except FileNotFoundError:
            if _exists(waiting / name):
                raise


def _exists(path: Path) -> bool:
    """As ``Path.exists``, but a disk error is an error and not an absence."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False
