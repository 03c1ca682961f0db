"""Another machine takes part in a run: it waits for the run's next start, and trains along.

It has no lease and writes nothing to the run's folder, or to its bucket, but, with fsdp, the slices
of its ranks.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.training.code.archive import kept_code, unpack_code
from holdfast.training.configuration.schema import Json
from holdfast.training.distributed.launcher import Ended, run_ranks
from holdfast.training.errors import ExperimentError, InputError, StorageError
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.experiment.loading import own_file, with_file
from holdfast.training.machines.note import Board, FolderBoard, Note, board_in, note_of, own_machine
from holdfast.training.machines.standing import standing_of
from holdfast.training.machines.visit import Visit, visited
from holdfast.training.preemption.signals import SignalFlag, install_signal_flag
from holdfast.training.ranks.bringing import Bringing
from holdfast.training.ranks.gpus import environments_of_ranks
from holdfast.training.ranks.launching import as_report
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.stage import EXIT_PREEMPTED
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.tiers.scratch import tier_folder

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
LOOK_AT_BUCKET_EVERY_S = 2.0
LOOK_AT_RUN_EVERY_S = 30.0
EXIT_TRAINED = 0


@dataclass(frozen=True)
class Joined:
    """The run that a machine takes part in, as it finds it.

    Attributes:
        place: the store.
        board: where its note is.
        store: a folder for its files here: the store itself, or one of the scratch disk.
        reference: ``run_id`` or ``experiment/run_id``.
        look_every_s: how often the note is read.
    """

    place: Path | Address
    board: Board
    store: Path
    reference: str
    look_every_s: float = LOOK_EVERY_S

    @property
    def is_shared(self) -> bool:
        """Whether the folder is that of the machine which starts the run."""
        return isinstance(self.board, FolderBoard)

    @classmethod
    def in_store(cls, store: Path | Address, reference: str) -> Joined:
        """Of a store that is a folder, or a bucket. Raises InputError or StorageError."""
        if isinstance(store, Path):
            return cls(store, FolderBoard(store), store, reference)
        folder = tier_folder(store, "guest")
        return cls(store, board_in(store), folder, reference, LOOK_AT_BUCKET_EVERY_S)


def join(joined: Joined, max_wait_s: float) -> int:
    """Take part in each start of a run until it is trained. The exit code.

    To be called in the main thread. Ends with 0 once the run is trained, and with 75 after a notice
    that this machine goes away.

    Raises InputError where what this machine has is not fit for the run, and StorageError where the
    run did not start for ``max_wait_s``.
    """
    guest = _Guest(joined, install_signal_flag())
    code = guest.until_trained(max_wait_s)
    guest.finish()
    return code


class _Guest:
    """This machine, which waits, takes part, and waits again."""

    def __init__(self, joined: Joined, flag: SignalFlag) -> None:
        self._joined = joined
        self._flag = flag
        self._bringing: Bringing | None = None
        self._said = self._done_with = ""
        self._has_notice = False
        self._attended_s = time.monotonic()
        self._looked_s = float("-inf")

    def until_trained(self, max_wait_s: float) -> int:
        """As ``join``."""
        while not self._is_leaving():
            note = self._note()
            if note is None or note.state != "open" or note.token == self._done_with:
                if self._is_trained(note):
                    return EXIT_TRAINED
                if note is not None or not self._said:
                    self._say(f"waiting until {self._joined.reference} is started")
            elif note.machine == own_machine():
                self._say(f"{note.name} was started on this machine, which takes part already")
                self._attended_s = time.monotonic()
            elif not self._visit(note) and self._is_trained(note):
                return EXIT_TRAINED
            if time.monotonic() - self._attended_s > max_wait_s:
                raise StorageError(
                    f"{self._joined.reference} was not started for {max_wait_s:g} s: start it with "
                    f"distributed.max_machines=2 or more, and the same --store"
                )
            time.sleep(self._joined.look_every_s)
        return EXIT_PREEMPTED

    def finish(self) -> None:
        """Let what is on its way into the bucket come there, if there is time."""
        if self._bringing is not None:
            self._bringing.finish(self._is_leaving)

    def _is_leaving(self) -> bool:
        return self._has_notice or self._flag.first is not None

    def _note(self) -> Note | None:
        """Where the run meets; None where there is no note, or the store does not answer."""
        try:
            return note_of(self._joined.board, self._joined.reference)
        except StorageError as error:
            self._say(str(error))
            return None

    def _is_trained(self, note: Note | None) -> bool:
        """Whether nothing is left to take part in; says so, and what else speaks against it.

        A note does not tell of a start with one machine alone; the run's own records do.
        """
        if note is not None and note.state == "completed":
            self._say(f"{note.name} is trained")
            return True
        if time.monotonic() - self._looked_s < LOOK_AT_RUN_EVERY_S:
            return False
        self._looked_s = time.monotonic()
        try:
            found = standing_of(self._joined.place, note.name if note else self._joined.reference)
        except StorageError as error:
            self._say(str(error))
            return False
        if found is not None and found.is_trained:
            self._say(f"{found.name} is trained")
        elif found is not None and note is None and found.max_machines == 1:
            self._say(
                f"{found.name} was begun for one machine, with distributed.max_machines=1: this "
                f"one takes part once it is started again with 2 or more"
            )
        return found is not None and found.is_trained

    def _visit(self, note: Note) -> bool:
        """Be at the meeting of a note. Whether it could be reached."""
        try:
            with visited(note) as visit:
                self._attend(note, visit)
        except StorageError as error:
            self._say(f"{error}; waiting until {note.name} is started again")
            return False
        return True

    def _attend(self, note: Note, visit: Visit) -> None:
        """Until the meeting is over, or this machine has taken part."""
        while not self._is_leaving() and not visit.is_over:
            self._attended_s = time.monotonic()
            if visit.is_invited:
                self._say(f"{note.name} starts, and this machine takes part")
                self._done_with = note.token
                self._take_part(note, visit)
                self._attended_s = time.monotonic()
                return
            if visit.start is None:
                self._say(f"{note.name} is about to start")
            else:
                self._say(f"{note.name} trains without this machine until it starts again")
            time.sleep(LOOK_EVERY_S)

    def _take_part(self, note: Note, visit: Visit) -> None:
        assert visit.start is not None
        run, told = RunDirectory(self._joined.store / note.name), visit.start
        if not self._joined.is_shared:
            _copy_record(run, told["record"])
        with _experiment_here(note.experiment, run) as experiment:
            command = _command(experiment, note, self._joined.store, told)
            place, device = visit.place(), told["config"]["train"]["device"]
            environments = environments_of_ranks(place.num_here, told["num_threads"], device)
            self._begin_bringing(run)
            ended = run_ranks(place, command, environments, Path.cwd(), told["hang_timeout_s"])
        visit.report(as_report(ended))
        if self._bringing is not None and _have_stopped(ended):
            self._bringing.hurry()
        self._has_notice = any((rank.outcome or {}).get("notice") for rank in ended.ranks)
        self._say(_told_end(ended))
        _require_fit(ended)

    def _begin_bringing(self, run: RunDirectory) -> None:
        """From now on bring up what the ranks here write, where the store is a bucket."""
        if isinstance(self._joined.place, Path):
            return
        if self._bringing is None:
            self._bringing = Bringing(open_store(self._joined.place), run)
        self._bringing.begin()

    def _say(self, line: str) -> None:
        if line != self._said:
            self._said = line
            logger.info("%s", line)


def _copy_record(run: RunDirectory, record: Json) -> None:
    """What the run was begun with, on a disk that has nothing else of it."""
    if record is None:
        run.run_json.unlink(missing_ok=True)  # of an earlier run of this name
        return
    run.path.mkdir(parents=True, exist_ok=True)
    write_json_durably(run.run_json, record)


def _command(experiment: str, note: Note, store: Path, told: Mapping[str, Any]) -> list[str]:
    """What a rank here is started with; the configuration it asks the other machine for."""
    options = ["--experiment", experiment, "--store", str(store), "--run-id", note.run_id]
    options += ["--progress", "none", *told["flags"]]
    num_threads = told["config"]["train"]["num_threads"]
    if num_threads is not None:
        options += ["--set", f"train.num_threads={num_threads}"]
    return python_command("holdfast.training", "segment", *options)


@contextmanager
def _experiment_here(reference: str, run: RunDirectory) -> Iterator[str]:
    """The experiment by a file that is here: one's own, or that which the run keeps.

    Raises ExperimentError where there is neither.
    """
    path = own_file(reference)
    if path is None or path.is_file():
        yield reference
        return
    if kept_code(run) is None:
        raise ExperimentError(
            f"experiment file {path} does not exist here, and {run.path} keeps no code yet: bring "
            f"it here, and start this command in the folder that the run was started in"
        )
    with tempfile.TemporaryDirectory(prefix="holdfast-code-") as folder:
        yield with_file(reference, unpack_code(run, Path(folder)))


def _told_end(ended: Ended) -> str:
    codes = {rank.exit_code for rank in ended.ranks}
    if codes == {0}:
        return "the ranks here have ended"
    if _have_stopped(ended):
        return "all have saved and stopped"
    return ended.lost or f"the ranks here have ended with {sorted(codes)}"


def _have_stopped(ended: Ended) -> bool:
    """Whether all ranks have ended after a notice."""
    return {rank.exit_code for rank in ended.ranks} == {EXIT_PREEMPTED}


def _require_fit(ended: Ended) -> None:
    """Raise InputError where a rank has found that this machine is not fit for the run."""
    for rank in ended.ranks:
        error = (rank.outcome or {}).get("error")
        if rank.exit_code == InputError.exit_code and error is not None:
            raise InputError(f"rank {rank.rank}: {error['message']}")
