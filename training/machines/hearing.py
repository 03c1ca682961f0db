"""Whether other machines are still heard of.

Each launcher counts up a number in the store twice a second, in a thread of its own: a call to a
machine that has vanished may never return.
"""

from __future__ import annotations

import time

from torch._C._distributed_c10d import TCPStore

BEAT_S = 0.5
LOST_S = 15.0
"""A machine that is silent for so long while all others wait for it is lost."""
GONE_S = 4.0
"""The same once the ranks have ended, because one of them was not there any more."""


class Quiet:
    """For how long nothing was heard, on the clock of somebody who was awake meanwhile.

    A machine that itself slept for a minute has not waited for a minute.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._looked_s = time.monotonic()

    def look(self, *, is_heard: bool) -> float:
        """Note whether something was heard since the last look; for how long there was nothing."""
        now_s = time.monotonic()
        awake_s = min(now_s - self._looked_s, 2 * BEAT_S)
        self._looked_s = now_s
        self.seconds = 0.0 if is_heard else self.seconds + awake_s
        return self.seconds


class Listening:
    """What the store's machine hears of the others."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store
        self._seen: dict[int, int] = {}
        self._quiet: dict[int, Quiet] = {}

    def silent_s(self, machine: int) -> float:
        """For how long nothing new was heard of a machine; from the first look on."""
        beats = self._store.add(beat_key(machine), 0)
        is_heard = beats != self._seen.get(machine)
        self._seen[machine] = beats
        return self._quiet.setdefault(machine, Quiet()).look(is_heard=is_heard)


def beat_key(machine: int) -> str:
    """Where a machine counts."""
    return f"beat/{machine}"
