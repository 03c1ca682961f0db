"""A meeting as another machine sees it, which has come to take part."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore

from holdfast.training.distributed.launcher import Place
from holdfast.training.machines.addresses import (
    OwnAddress,
    address_towards,
    require_reachable,
    unreachable,
)
from holdfast.training.machines.hearing import BEAT_S, LOST_S, Quiet, beat_key
from holdfast.training.machines.meeting import COUNT, NAME, REPORT, START, STOPPING
from holdfast.training.machines.note import Note
from holdfast.training.runs.process_identity import current_process


class Visit:
    """What this machine hears and tells at a meeting.

    A thread makes the calls to the other machine: one that has vanished may never answer.
    """

    def __init__(self, note: Note, store: TCPStore, address: OwnAddress) -> None:
        """For ``visited``."""
        self.start: Mapping[str, Any] | None = None
        """What all who start are told; None until they do."""
        self._note, self._store, self._address = note, store, address
        self._number = store.add(COUNT, 1)
        host = current_process().host
        store.set(NAME.format(self._number), json.dumps(f"{host} ({address.host})"))
        self._report: str | None = None
        self._stopping: str | None = None
        self._num_answers = self._num_seen = 0
        self._quiet = Quiet()
        self._should_stop = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="holdfast-visit", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the machine of the meeting is gone."""
        return not self._thread.is_alive() or self._silent_s() >= LOST_S

    @property
    def is_invited(self) -> bool:
        """Whether this machine is one of those that start."""
        return self.start is not None and self._number in self.start["machines"]

    def place(self) -> Place:
        """Of the ranks that are started here."""
        assert self.start is not None
        machines, num_here = self.start["machines"], self.start["num_processes"]
        first = machines.index(self._number) * num_here
        size, host = len(machines) * num_here, self._note.host
        return Place(size, first, num_here, host, self._store, self._address.interface, self)

    def lost(self) -> str | None:
        """As ``Others.lost``."""
        if not self.is_over:
            return self._stopping
        return f"the machine at {self._note.host} that the run was started on is lost"

    def gone(self) -> str | None:
        """As ``Others.gone``: the other machine looks for them."""
        return None

    def newcomer(self) -> str | None:
        """As ``Others.newcomer``: the other machine looks for them."""
        return None

    def report(self, ended: Mapping[str, Any]) -> None:
        """Tell how the ranks here have ended; returns when that is told, or nobody is left."""
        self._report = json.dumps(ended)
        while self._report is not None and not self.is_over:
            time.sleep(BEAT_S / 5)

    def leave(self) -> None:
        """Talk no more."""
        self._should_stop.set()

    def _silent_s(self) -> float:
        answers = self._num_answers
        is_heard, self._num_seen = answers > self._num_seen, answers
        return self._quiet.look(is_heard=is_heard)

    def _talk(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: so is this thread
            store: Any = self._store.clone()  # type: ignore[attr-defined]
            while not self._should_stop.wait(BEAT_S):
                store.add(beat_key(self._number), 1)
                if self.start is None and store.check([START]):
                    self.start = json.loads(store.get(START))
                if self._stopping is None and store.check([STOPPING]):
                    self._stopping = json.loads(store.get(STOPPING))
                if self._report is not None:
                    store.set(REPORT.format(self._number), self._report)
                    store.check([START])  # an answer: what was sent before it has come
                    self._report = None
                self._num_answers += 1


@contextlib.contextmanager
def visited(note: Note) -> Iterator[Visit]:
    """Be at a meeting while the block runs.

    Raises StorageError where its place cannot be reached.
    """
    require_reachable(note.host, note.port)
    try:
        store = TCPStore(note.host, note.port, is_master=False, timeout=timedelta(seconds=LOST_S))
        visit = Visit(note, store, address_towards(note.host, note.port))
    except RuntimeError as error:
        raise unreachable(note.host, note.port, " ".join(str(error).split())[:200]) from error
    try:
        yield visit
    finally:
        visit.leave()
