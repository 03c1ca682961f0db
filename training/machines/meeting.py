"""Where the machines of a run meet, on the machine that has started it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch._C._distributed_c10d import TCPStore

from holdfast.training.configuration.schema import DistributedConfig
from holdfast.training.distributed.launcher import GOOD_CODES, Ended, Place
from holdfast.training.distributed.world import LOST
from holdfast.training.machines.addresses import OwnAddress, listening_socket, own_address
from holdfast.training.machines.hearing import BEAT_S, GONE_S, LOST_S, Listening
from holdfast.training.machines.note import Note, State, board_of, new_note, write_quietly
from holdfast.training.runs.paths import RunDirectory

logger = logging.getLogger(__name__)

COUNT = "machines"
"""Counts the machines that have come; each takes the number that it has counted to."""
NAME, REPORT = "machine/{}", "report/{}"
START = "start"
"""Which of them train together, and what they are told; set once."""
STOPPING = "stopping"
"""Why the ranks of the first machine have ended, where that was no good end."""
FIRST = 0
TOLD_EVERY_S = 60.0
NEWCOMER_WAIT_S = 30.0


class Meeting:
    """The store over which machines meet, those that have come, and those that train together."""

    def __init__(
        self, store: TCPStore, address: OwnAddress, config: DistributedConfig, note: Note
    ) -> None:
        """For ``opened_meeting``."""
        self.note = note
        self.state: State = "away"
        self.machines: list[int] = [FIRST]
        self._store, self._address, self._config = store, address, config
        self._listening = Listening(store)
        self._reports: dict[int, dict[str, Any]] = {}
        self._lost: str | None = None
        self._looked_s = self._begun_s = 0.0

    def gather(self, should_stop: Callable[[], bool], *, is_expecting: bool = False) -> bool:
        """Wait until so many machines are there as are asked for; False where it has to stop.

        Once there are enough, more are waited for as long as the configuration says, and longer
        where ``is_expecting`` says that all have stopped for one that had come.
        """
        wait_s = self._config.machines_wait_s
        if is_expecting:
            wait_s = max(wait_s, NEWCOMER_WAIT_S)
        most = self._config.num_machines_of(self._config.max_machines)
        enough_s, told_s = None, float("-inf")
        while not should_stop():
            there, now_s = self._there(), time.monotonic()
            number = self._config.num_machines_of(1 + len(there))
            if number is None:
                enough_s = None
                if now_s - told_s >= TOLD_EVERY_S:
                    told_s = now_s
                    self._tell_waiting(1 + len(there))
            else:
                enough_s = enough_s or now_s
                if number == most or now_s - enough_s >= wait_s:
                    self.machines = [FIRST, *there[: number - 1]]
                    return True
            time.sleep(BEAT_S / 5)
        return False

    def begin(self, told: Mapping[str, Any]) -> Place:
        """Tell the machines that they start, and with what. Returns the place of this one."""
        num_here = self._config.num_processes
        size = num_here * len(self.machines)
        start = {**told, "machines": self.machines, "num_processes": num_here}
        self._store.set(START, json.dumps(start))
        if len(self.machines) > 1:
            names = ", ".join(self._name(machine) for machine in self.machines[1:])
            logger.info("%d machines train together: this one, %s", len(self.machines), names)
        host, interface = self._address.host, self._address.interface
        return Place(size, 0, num_here, host, self._store, interface, self)

    def lost(self) -> str | None:
        """As ``Others.lost``."""
        if self._lost is not None or self._is_too_soon():
            return self._lost
        self._read_reports()
        failed = (self._told_failed(machine) for machine in self._reports)
        self._lost = next(filter(None, failed), None) or self._silent(LOST_S)
        return self._lost

    def gone(self) -> str | None:
        """As ``Others.gone``."""
        if self._is_too_soon():
            return None
        self._read_reports()
        return self._silent(GONE_S)

    def newcomer(self) -> str | None:
        """As ``Others.newcomer``; is asked from the first step on."""
        now_s, grow_after_s = time.monotonic(), self._config.grow_after_s
        self._begun_s = self._begun_s or now_s
        if grow_after_s is None or now_s - self._begun_s < grow_after_s:
            return None
        new = [machine for machine in self._there() if machine not in self.machines]
        number = self._config.num_machines_of(len(self.machines) + len(new))
        if not new or number is None or number <= len(self.machines):
            return None
        return f"{self._name(new[0])} has come, and is taken in by a new start"

    def reports(self, here: Ended) -> tuple[list[dict[str, Any]], str | None]:
        """What the other machines say of the end of their ranks; and which one is lost, if any.

        Those here have ended. Waits for each of the others.
        """
        self.tell_end(here)
        while True:
            self._read_reports()
            missing = [machine for machine in self.machines[1:] if machine not in self._reports]
            lost = self._unheard(GONE_S)
            if len(lost) == len(missing):
                told = self._told_lost(lost[0], GONE_S) if lost else None
                return [self._reports[machine] for machine in sorted(self._reports)], told
            time.sleep(BEAT_S)

    def tell_end(self, here: Ended) -> None:
        """Have the others stop where the ranks here have come to no good end."""
        if not all(rank.exit_code in GOOD_CODES for rank in here.ranks):
            self._store.set(STOPPING, json.dumps("the ranks of the first machine have ended"))

    def _read_reports(self) -> None:
        for machine in self.machines[1:]:
            key = REPORT.format(machine)
            if machine not in self._reports and self._store.check([key]):
                self._reports[machine] = json.loads(self._store.get(key))

    def _told_failed(self, machine: int) -> str | None:
        """That ranks of a machine have ended, where that was no good end."""
        codes = [rank["exit_code"] for rank in self._reports[machine]["ranks"]]
        if all(code in GOOD_CODES for code in codes):
            return None
        return f"the ranks of machine {self._name(machine)} have ended with {codes}"

    def _is_too_soon(self) -> bool:
        """A look costs a call for each machine."""
        now_s = time.monotonic()
        if now_s - self._looked_s < BEAT_S:
            return True
        self._looked_s = now_s
        return False

    def _there(self) -> list[int]:
        """Numbers of the machines that have come and are still heard of."""
        numbers = range(1, self._store.add(COUNT, 0) + 1)
        known = [number for number in numbers if self._store.check([NAME.format(number)])]
        return [number for number in known if self._listening.silent_s(number) < GONE_S]

    def _unheard(self, silent_s: float) -> Sequence[int]:
        """Those that train along, have not ended, and are silent for so long."""
        return [
            machine
            for machine in self.machines[1:]
            if machine not in self._reports and self._listening.silent_s(machine) >= silent_s
        ]

    def _silent(self, silent_s: float) -> str | None:
        """Which machine is; ranks that wait for it are told."""
        told = [self._told_lost(machine, silent_s) for machine in self._unheard(silent_s)]
        if not told:
            return None
        self._store.set(LOST, json.dumps(told[0]))
        return told[0]

    def _told_lost(self, machine: int, silent_s: float) -> str:
        first = self.machines.index(machine) * self._config.num_processes
        ranks = range(first, first + self._config.num_processes)
        told = ", ".join(map(str, ranks))
        return (
            f"machine {self._name(machine)} with rank{'s' if len(ranks) > 1 else ''} {told} is "
            f"lost: nothing was heard of it for {silent_s:g} s"
        )

    def _name(self, machine: int) -> str:
        return str(json.loads(self._store.get(NAME.format(machine))))

    def _tell_waiting(self, num_there: int) -> None:
        logger.warning(
            "waiting for machines at %s:%d: %d of at least %d are there; start `holdfast join %s` "
            "on others, with the same --store",
            self.note.host,
            self.note.port,
            num_there,
            self._config.min_machines,
            self.note.run_id,
        )


@contextmanager
def opened_meeting(
    run: RunDirectory, experiment: str, config: DistributedConfig
) -> Iterator[Meeting]:
    """A place to meet, and a note in the run's store that says where, while the block runs.

    Raises InputError where others cannot come to this machine as it was told, and StorageError
    where the note cannot be written.
    """
    address = own_address()
    with listening_socket(address) as listener:
        host, port = listener.getsockname()
        descriptor = listener.detach()
    store = TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
    )
    board, note = board_of(run), new_note(run, experiment, host, port)
    board.write(note)
    meeting = Meeting(store, address, config, note)
    try:
        yield meeting
    finally:
        write_quietly(board, replace(note, state=meeting.state))
