"""A machine that has joined a run brings what its ranks have written into the bucket itself.

A rank leaves its files in an outbox beside the run, and is done. They are brought up by the process
that has started it, since no process that trains calls a bucket; and that one is still there when
the ranks have saved for the last time. They are carried to the first machine all the same, which
needs none of this: what does not come, it sends.

    <outbox>/<rank>/<number of the save>/checkpoints/step-00000420/model-00003-of-00004.safetensors
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from holdfast.training.errors import HoldfastError, StorageError
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.faultpoints import reach
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.protocol import PART_BYTES, ObjectStore
from holdfast.training.tiers.bandwidth import Throttle, asked_limit
from holdfast.training.tiers.brought import key_of, tell
from holdfast.training.tiers.head import read_head, run_folder
from holdfast.training.tiers.keeping import END_PATIENCE_S, GRACE_S
from holdfast.training.tiers.scratch import replica_folder, run_name
from holdfast.training.tiers.transfer import upload_file
from holdfast.training.tiers.tree import Tree, TreeFile

logger = logging.getLogger(__name__)

OUTBOX = "outbox"
LOOK_EVERY_S = 0.2
LOOK_AT_HEAD_EVERY_S = 2.0
MAX_TOLD = 64
"""What is older was taken long ago, or will never be."""


def leave(run: RunDirectory, rank: int, number: int, step: int, files: Iterable[Path]) -> None:
    """Let files of a checkpoint be brought up, in the place of those of the saves before.

    Small ones are left to the first machine. Raises StorageError.
    """
    outbox = _outbox(run) / str(rank)
    name = f"{number:08d}"
    making = outbox / f".{name}"
    place = making / run.checkpoint(step).relative_to(run.path)
    try:
        shutil.rmtree(outbox, ignore_errors=True)
        place.mkdir(parents=True)
        for file in files:
            if file.stat().st_size > PART_BYTES:
                os.link(file, place / file.name)
        making.rename(outbox / name)
    except OSError as error:
        raise storage_error("leave files in", outbox, error) from error


class Bringing:
    """Brings up what ranks of this machine leave, in a thread of its own."""

    def __init__(self, store: ObjectStore, run: RunDirectory) -> None:
        """Nothing is done yet. ``run`` is as it is named on this machine's disk."""
        self._store, self._run = store, run
        self._machine = secrets.token_hex(8)
        self._throttle = Throttle()
        self._folder = ""
        self._told: dict[str, TreeFile] = {}
        self._num_brought = 0
        self._is_failing = False
        self._is_ending, self._should_stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="holdfast-bringing", daemon=True)

    def begin(self) -> None:
        """Ranks are about to be started here. What those before have left is not begun any more.

        Raises InputError where a limit is asked for that is none.
        """
        self._throttle = asked_limit()
        shutil.rmtree(_outbox(self._run), ignore_errors=True)
        if self._thread.ident is None:
            self._thread.start()

    def hurry(self) -> None:
        """All have saved and stopped: until the next begin, no limit is kept to."""
        self._throttle.lift()

    def finish(self, is_urgent: Callable[[], bool]) -> None:
        """Return when all is up that was left, or is needed no more; never raises.

        As soon as it ``is_urgent``, as after a notice, there is no time for long.
        """
        self._is_ending.set()
        start_s, patience_s = time.monotonic(), END_PATIENCE_S
        while self._thread.is_alive() and time.monotonic() - start_s < patience_s:
            if is_urgent():
                patience_s = GRACE_S
                self.hurry()
            self._thread.join(LOOK_AT_HEAD_EVERY_S)
            if self._thread.is_alive() and not self._is_awaited():
                break
        self._should_stop.set()

    def _work(self) -> None:
        while not self._should_stop.is_set():
            is_ending = self._is_ending.is_set()
            file = self._next()
            if file is not None:
                self._bring(file)
            elif is_ending:
                return
            else:
                self._is_ending.wait(LOOK_EVERY_S)

    def _next(self) -> Path | None:
        """The first file of the newest save that is left; the run's holder begins with the last."""
        try:
            files = _outbox(self._run).glob("[0-9]*/[0-9]*/*/*/*")
            return min(files, key=lambda file: (-int(file.parts[-4]), file.name), default=None)
        except FileNotFoundError:  # a newer save takes its place just now
            return None

    def _bring(self, file: Path) -> None:
        try:
            folder = self._holders_folder()
            if folder is not None and file.exists():
                self._bring_up(file, folder)
        except (HoldfastError, OSError) as error:
            if file.exists() and not self._should_stop.is_set():  # no newer save has come
                self._tell_failure(error)
        else:
            self._is_failing = False
        finally:
            file.unlink(missing_ok=True)

    def _holders_folder(self) -> str | None:
        """Below which the holder of the run's head has its objects; None where nobody holds it."""
        found = read_head(self._store, run_name(self._run))
        if found is None or found[0].is_released:
            return None
        return f"{run_folder(run_name(self._run))}/{found[0].folder}"

    def _bring_up(self, file: Path, folder: str) -> None:
        if folder != self._folder:
            self._folder, self._told = folder, {}
        path = file.relative_to(_outbox(self._run)).as_posix().split("/", 2)[2]
        self._num_brought += 1
        key = key_of(folder, self._machine, self._num_brought, path)
        reach("brought.before-file")
        self._told[path] = upload_file(self._store, file, key, self._before_part)
        while len(self._told) > MAX_TOLD:
            del self._told[next(iter(self._told))]
        reach("brought.before-told")
        tell(self._store, folder, self._machine, Tree(self._told))
        reach("brought.after-told")

    def _before_part(self, num_bytes: int) -> None:
        reach("brought.before-part")
        self._throttle.take(num_bytes, self._should_stop.is_set)
        if self._should_stop.is_set():
            raise StorageError("given up: the first machine needs it no more")

    def _is_awaited(self) -> bool:
        """Whether the holder that files are brought up for is still there, as far as is seen."""
        try:
            folder = self._holders_folder()
            return folder is not None and self._folder in ("", folder)
        except (HoldfastError, OSError):
            return True

    def _tell_failure(self, error: Exception) -> None:
        if not self._is_failing:
            logger.warning("the first machine brings up what was written here: %s", error)
        self._is_failing = True


def _outbox(run: RunDirectory) -> Path:
    return replica_folder(run) / OUTBOX
