"""Saves of weights that lie in slices: each rank writes its own, and rank 0 commits for all.

Rank 0 says when to copy. From then on each rank works in the background: it waits for the folder
that rank 0 stages, writes its files to it, and reports their digests over a connection of its own.
Where a machine has no folder in common with rank 0, they go to its own disk, and are carried; large
ones are brought into the bucket from there, too.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.training.checkpointing.manager import of_weights, require_finite
from holdfast.training.checkpointing.manifest import FileEntry
from holdfast.training.checkpointing.policy import Kind
from holdfast.training.checkpointing.slices import Slicing
from holdfast.training.checkpointing.snapshot import FileImage, SnapshotBuffers
from holdfast.training.checkpointing.storage import NOBODY, OtherWriters, write_files
from holdfast.training.distributed.world import World
from holdfast.training.errors import (
    HoldfastError,
    NonFiniteStateError,
    RankLostError,
    StorageError,
)
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.trainer import Saving
from holdfast.training.preemption.notices import Notice
from holdfast.training.ranks.bringing import leave
from holdfast.training.ranks.carrying import Carrier
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.faultpoints import reach
from holdfast.training.runs.paths import RunDirectory

logger = logging.getLogger(__name__)

AGAIN, DONE = "again", "done"
OWN_DISK = ".slices-of-rank-{}"


def others_of_first(
    state: TrainState, world: World, run: Path, carrier: Carrier | None = None
) -> OtherWriters:
    """Who writes beside rank 0, into the folder of the run: nobody, where it has all weights."""
    return NOBODY if state.spread is None else SlicesOfOthers(world, state.spread, run, carrier)


def saving_of_first(state: TrainState, saver: Saving, world: World) -> Saving:
    """What rank 0 saves by: the saver, after which it tells the other ranks to go on."""
    if state.spread is None:
        return saver

    def tell() -> None:
        world.beat()
        world.from_first(DONE)

    return _Followed(saver, tell)


def saving_of_other(
    state: TrainState, saver: Saving, world: World, run: Path, carrier: Carrier | None = None
) -> Saving:
    """What another rank saves by: nothing, or its slices when rank 0 asks for them."""
    if state.spread is None:
        return saver
    return _Followed(saver, OwnSlices(world, state, state.spread, run, carrier).follow)


class SlicesOfOthers:
    """What rank 0 knows of the slices that other ranks write."""

    def __init__(self, world: World, slicing: Slicing, run: Path, carrier: Carrier | None) -> None:
        self.slicing = slicing
        self._run = self._folder = run
        self._carrier = carrier
        self._world = world
        self._beside = world.for_thread()
        self._number = 0
        self._is_begun = self._is_awaited = self._is_asked_for = False

    def ask(self, kind: Kind | None) -> None:
        """As ``OtherWriters.ask``."""
        self._number += 1
        self._is_begun = self._is_awaited = self._is_asked_for = False
        self._world.beat()
        self._world.from_first(kind or AGAIN)

    def begin(self, folder: Path) -> None:
        """As ``OtherWriters.begin``."""
        self._folder = folder
        self._is_begun = self._is_awaited = True
        # Another machine may name the run's folder otherwise.
        self._beside.tell(_folder_key(self._number), str(folder.relative_to(self._run)))

    def entries(self) -> dict[str, FileEntry]:
        """As ``OtherWriters.entries``."""
        reports = self._reports()
        for rank, report in reports.items():
            if "error" in report:
                raise _error(rank, report)
        entries = {
            rank: {name: FileEntry(**fields) for name, fields in report["files"].items()}
            for rank, report in reports.items()
        }
        if self._carrier is not None:
            self._ask_for_files(is_wanted=True)
            for rank in self._carrier.ranks:
                self._carrier.receive(rank, self._folder, entries[rank])
        return {name: entry for files in entries.values() for name, entry in files.items()}

    def end(self) -> None:
        """As ``OtherWriters.end``."""
        if not self._is_begun:
            self._beside.tell(_folder_key(self._number), None)
        elif self._is_awaited:
            with suppress(RankLostError):  # who is lost writes nothing
                self._reports()
        if self._is_begun:
            self._ask_for_files(is_wanted=False)

    def _ask_for_files(self, *, is_wanted: bool) -> None:
        """Once for each checkpoint: those that carry their files wait for it."""
        if self._carrier is not None and not self._is_asked_for:
            self._is_asked_for = True
            self._beside.tell(_wanted_key(self._number), is_wanted)

    def _reports(self) -> dict[int, Any]:
        ranks = range(1, self._world.size)
        reports = {rank: self._beside.awaited(_report_key(self._number, rank)) for rank in ranks}
        self._is_awaited = False
        return reports


class OwnSlices:
    """The slices of a rank other than the first: copied when rank 0 asks, written as it goes."""

    def __init__(
        self,
        world: World,
        state: TrainState,
        slicing: Slicing,
        run: Path,
        carrier: Carrier | None,
    ) -> None:
        self._run = run
        self._carrier = carrier if carrier is not None and world.rank in carrier.ranks else None
        self._world = world
        self._beside = world.for_thread()
        self._state = state
        self._buffers = SnapshotBuffers(slicing)
        self._images: Mapping[str, FileImage] = {}
        self._finite: Mapping[str, Tensor] = {}
        self._step = 0
        self._thread = ThreadPoolExecutor(1, "holdfast-save")
        self._in_flight: Future[None] | None = None
        self._number = 0

    def follow(self) -> None:
        """Do what rank 0 asks for, until it says that there is nothing more."""
        while (asked := self._world.from_first(None)) != DONE:
            if self._in_flight is not None:
                self._in_flight.result()
            reach("slices.before-copy")
            if asked != AGAIN:
                self._copy(asked)
            self._number += 1
            self._in_flight = self._thread.submit(self._write, self._number)

    def _copy(self, kind: Kind) -> None:
        tensors, _ = self._state.capture()
        wanted = tensors if kind == "full" else of_weights(tensors)
        self._images = self._buffers.take(wanted)
        self._finite = self._buffers.copied(self._state.must_be_finite(tensors))
        self._step = self._state.counters.step

    def _write(self, number: int) -> None:
        folder = self._beside.awaited(_folder_key(number))
        if folder is None:
            return
        reach("slices.before-write")
        place = self._run / folder
        if self._carrier is not None:
            place = self._run / OWN_DISK.format(self._world.rank)
            shutil.rmtree(place, ignore_errors=True)
        try:
            report = self._report(place)
        except BaseException as error:
            self._beside.tell_error(error)  # rank 0 waits for the report
            raise
        if self._carrier is not None and "files" in report:
            self._leave(number, [place / name for name in report["files"]])
        reach("slices.before-report")
        self._beside.tell(_report_key(number, self._world.rank), report)
        reach("slices.after-report")
        if self._carrier is not None and self._beside.awaited(_wanted_key(number)):
            self._carrier.send(place, report["files"])

    def _report(self, folder: Path) -> dict[str, Any]:
        try:
            require_finite(self._finite, self._step)
            if self._carrier is not None:
                folder.mkdir(parents=True)
            written = write_files(folder, self._images)
        except NonFiniteStateError as error:
            return {"error": str(error), "step": error.step, "tensor": error.tensor}
        except StorageError as error:
            return {"error": str(error)}
        except OSError as error:
            return {"error": str(storage_error("write", folder, error, self._num_bytes()))}
        return {"files": {name: entry.model_dump() for name, entry in written.items()}}

    def _leave(self, number: int, files: Sequence[Path]) -> None:
        """Let this machine bring up what it has written, if it can: else the first one does."""
        try:
            leave(RunDirectory(self._run), self._world.rank, number, self._step, files)
        except StorageError as error:
            logger.warning("the first machine brings up what was written here: %s", error)

    def _num_bytes(self) -> int:
        return sum(image.size_bytes for image in self._images.values())


def _error(rank: int, report: Mapping[str, Any]) -> HoldfastError:
    """What rank 0 raises for what another one could not write."""
    message = f"rank {rank}: {report['error']}"
    if "tensor" in report:
        return NonFiniteStateError(message, step=report["step"], tensor=report["tensor"])
    return StorageError(message)


def _folder_key(number: int) -> str:
    return f"slices/{number}/folder"


def _wanted_key(number: int) -> str:
    return f"slices/{number}/wanted"


def _report_key(number: int, rank: int) -> str:
    return f"slices/{number}/report/{rank}"


class _Followed:
    """A saver; after each call that may save, the ranks agree that it has ended."""

    def __init__(self, saver: Saving, after: Callable[[], None]) -> None:
        self._saver = saver
        self._after = after

    def is_light_due(self) -> bool:
        """As ``Saving.is_light_due``."""
        return self._saver.is_light_due()

    def after_step(self, measured: Mapping[str, float] | None = None) -> None:
        """As ``Saving.after_step``."""
        self._saver.after_step(measured)
        self._after()

    def after_epoch(self, metrics: Mapping[str, float], *, is_last: bool) -> None:
        """As ``Saving.after_epoch``."""
        self._saver.after_epoch(metrics, is_last=is_last)
        self._after()

    def finish(self) -> None:
        """As ``Saving.finish``."""
        self._saver.finish()
        self._after()

    def stop(self, notice: Notice) -> None:
        """As ``Saving.stop``."""
        self._saver.stop(notice)
        self._after()
