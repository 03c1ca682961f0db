"""Where the machines of a run meet: a note in its store, which other machines look for.

    <store>/.meetings/<experiment>/<run id>.json     in a folder
    meetings/<experiment>/<run id>.json              in a bucket

It lies beside the run and is no part of it: a run that has not begun has none of its files yet.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, get_args

from holdfast.training.errors import DataFormatError, InputError, StorageError
from holdfast.training.runs.durable_json import storage_error, write_json_durably
from holdfast.training.runs.paths import RUN_ID, RunDirectory
from holdfast.training.runs.process_identity import current_process
from holdfast.training.runs.stored_json import Kinds, Limits, parse_json, read_json, required_fields
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import ObjectStore
from holdfast.training.tiers.scratch import address_of, run_name

FORMAT_VERSION = 1
FOLDER, PREFIX = ".meetings", "meetings"
LIMITS = Limits(max_bytes=2**14, max_depth=2)
State = Literal["open", "away", "completed"]
FIELDS: Kinds = {
    "format_version": (int,),
    "name": (str,),
    "experiment": (str,),
    "host": (str,),
    "port": (int,),
    "machine": (str,),
    "token": (str,),
    "state": (str,),
}


def own_machine() -> str:
    """What tells this machine, or container, apart from every other one."""
    here = current_process()
    return f"{here.boot_id}/{here.pid_namespace}"


@dataclass(frozen=True)
class Note:
    """Where and when a run's machines meet.

    Attributes:
        name: of the run, ``experiment/run_id``.
        experiment: as it was named on the machine that has started the run.
        host: of the meeting place.
        port: of the meeting place.
        machine: which has written it, told apart from every other one.
        state: ``away`` until the run is started again, ``completed`` once it is trained.
        token: drawn for each start.
    """

    name: str
    experiment: str
    host: str
    port: int
    machine: str = field(default_factory=own_machine)
    state: State = "open"
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def to_bytes(self) -> bytes:
        """As it is stored."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}).encode()

    @property
    def run_id(self) -> str:
        """Of the run."""
        return self.name.rpartition("/")[2]


class Board(Protocol):
    """Where notes are kept; ``name`` is ``experiment/run_id``."""

    def names(self) -> list[str]:
        """The runs that have a note."""
        ...

    def read(self, name: str) -> Note | None:
        """The note of a run; None where it has none. Raises DataFormatError, StorageError."""
        ...

    def write(self, note: Note) -> None:
        """Write it over the one before. Raises StorageError."""
        ...


class FolderBoard:
    """Notes in a store that is a folder."""

    def __init__(self, store: Path) -> None:
        self._folder = store / FOLDER

    def names(self) -> list[str]:
        """As ``Board.names``."""
        paths = self._folder.glob("*/*.json")
        return sorted(f"{path.parent.name}/{path.stem}" for path in paths)

    def read(self, name: str) -> Note | None:
        """As ``Board.read``."""
        path = self._path(name)
        try:
            return _checked(required_fields(read_json(path, LIMITS), path, FIELDS), str(path))
        except FileNotFoundError:
            return None

    def write(self, note: Note) -> None:
        """As ``Board.write``."""
        path = self._path(note.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error("make the folder", path.parent, error) from error
        write_json_durably(path, json.loads(note.to_bytes()))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


class BucketBoard:
    """Notes in a bucket."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def names(self) -> list[str]:
        """As ``Board.names``."""
        keys = [listed.key for listed in self._store.list(PREFIX)]
        return [key.removeprefix(f"{PREFIX}/").removesuffix(".json") for key in keys]

    def read(self, name: str) -> Note | None:
        """As ``Board.read``."""
        found = self._store.get(_key(name), 0, LIMITS.max_bytes)
        if found is None:
            return None
        source = f"the note of {name}"
        value = parse_json(found.content, source, LIMITS)
        return _checked(required_fields(value, source, FIELDS), source)

    def write(self, note: Note) -> None:
        """As ``Board.write``."""
        self._store.put(_key(note.name), note.to_bytes(), "any")


def board_of(run: RunDirectory) -> Board:
    """Where a run's note belongs: beside it, or in the bucket that its folder is kept up to."""
    store = run.path.parent.parent
    address = address_of(store)
    return FolderBoard(store) if address is None else board_in(address)


def board_in(address: Address) -> Board:
    """The notes of a bucket. Raises InputError."""
    return BucketBoard(open_store(address))


def note_of(board: Board, reference: str) -> Note | None:
    """The note of the run that is called ``run_id`` or ``experiment/run_id``.

    Raises InputError where several experiments have one of that id.
    """
    if "/" in reference:
        return board.read(reference)
    names = [name for name in board.names() if name.rpartition("/")[2] == reference]
    if len(names) > 1:
        raise InputError(
            f"run {reference!r} is ambiguous: {', '.join(names)}; name one of them in full"
        )
    return board.read(names[0]) if names else None


def new_note(run: RunDirectory, experiment: str, host: str, port: int) -> Note:
    """The note of one start of a run."""
    return Note(run_name(run), experiment, host, port)


def note_trained(run: RunDirectory) -> None:
    """Have machines that wait for a run know that it has ended before, if the store answers."""
    with contextlib.suppress(StorageError):
        board = board_of(run)
        note = board.read(run_name(run))
        if note is not None and note.state != "completed":
            board.write(replace(note, state="completed"))


def write_quietly(board: Board, note: Note) -> None:
    """Where what ended the start matters more than that nobody is told."""
    with contextlib.suppress(StorageError):
        board.write(note)


def _key(name: str) -> str:
    return f"{PREFIX}/{name}.json"


def _checked(told: dict[str, object], source: str) -> Note:
    """The note that a machine can have written. Raises DataFormatError."""
    fields = {name: told[name] for name in FIELDS if name != "format_version"}
    experiment, _, run_id = str(fields["name"]).partition("/")
    port, state = fields["port"], fields["state"]
    is_good = (
        told["format_version"] == FORMAT_VERSION
        and all(RUN_ID.fullmatch(part) for part in (experiment, run_id))
        and isinstance(port, int)
        and 0 < port < 2**16
        and state in get_args(State)
    )
    if not is_good:
        raise DataFormatError(f"{source} is no note of this version of Holdfast; delete it")
    return Note(**fields)  # type: ignore[arg-type]
