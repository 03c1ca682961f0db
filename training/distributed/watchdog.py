"""Who hangs: does nothing new for too long. The launcher watches several, a small process one.

    python -m holdfast.training.distributed.watchdog PID FOLDER TIMEOUT_S STARTING_S

watches a process that counts up its beats in FOLDER. It shares nothing with that process but the
memory of the counter: whatever holds the interpreter there, a call that never returns, or a stop,
does not hold it here. Imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from holdfast.training.distributed.seat import Beats
from holdfast.training.exactness.reproducibility import python_command

STARTING_S = 600.0
"""How long processes may take until their first step is done, where that is more than they may be
silent later: they import, build, restore and compile."""
STACKS_S = 1.0
STACKS_SIGNAL = signal.SIGUSR2
POLL_S = 0.2
NUM_BEATS_OF_ONE = 2  # before its first step, and before its second


class Silence:
    """How long nothing new has happened, and whether that is too long."""

    def __init__(
        self,
        beats: Beats,
        timeout_s: float,
        num_beats_of_start: int,
        starting_s: float = STARTING_S,
    ) -> None:
        """Until each process has beaten so often, it is starting, and may be silent for longer."""
        self._beats = beats
        self._timeout_s = timeout_s
        self._starting_s = max(timeout_s, starting_s)
        self._num_beats_of_start = num_beats_of_start
        self._seen, self._seen_s = beats.all(), time.monotonic()

    def has_begun(self) -> bool:
        """Whether none is starting any more."""
        return min(self._seen) >= self._num_beats_of_start

    def too_long_s(self) -> float | None:
        """For how long nothing has happened, where that is more than is allowed; None else."""
        now_s = time.monotonic()
        allowed_s = self._timeout_s if self.has_begun() else self._starting_s
        if (found := self._beats.all()) != self._seen:
            self._seen, self._seen_s = found, now_s
            return None
        silent_s = now_s - self._seen_s
        return silent_s if silent_s > allowed_s else None


def ask_for_stacks(pids: Iterable[int]) -> None:
    """Have processes write where each of their threads stands, and give them time for it."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)
    time.sleep(STACKS_S)


def answer_for_stacks() -> None:
    """From now on this process writes to standard error where it stands, when it is asked."""
    faulthandler.register(STACKS_SIGNAL, all_threads=True)


class Watch:
    """Nobody watches: nothing is done where something new happens."""

    def beat(self) -> None:
        """Something new has happened."""

    def end(self) -> None:
        """From now on nobody watches."""


class _Watchdog(Watch):
    """A small process that kills this one where nothing new happens for too long."""

    def __init__(self, folder: str, timeout_s: float) -> None:
        self._beats = Beats(Path(folder), 1)
        told = (str(os.getpid()), folder, str(timeout_s), str(STARTING_S))
        # Signals to the terminal's group are not for it, and it ends with what it watches.
        self._process = subprocess.Popen(
            python_command(__name__, *told), stdin=subprocess.DEVNULL, start_new_session=True
        )

    def beat(self) -> None:
        """Count up. Takes less than a microsecond."""
        self._beats.beat(0)

    def end(self) -> None:
        """Again, it finds nothing to do."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def watched(timeout_s: float | None) -> Iterator[Watch]:
    """Within the block, or until the watch is ended, this process is killed where it hangs.

    It hangs where ``beat`` is not called for so long; None watches nothing.
    """
    if timeout_s is None:
        yield Watch()
        return
    answer_for_stacks()
    with tempfile.TemporaryDirectory(prefix="holdfast-beats-") as folder:
        watchdog = _Watchdog(folder, timeout_s)
        try:
            yield watchdog
        finally:
            watchdog.end()


def main() -> None:
    """Watch until the process has ended, or hangs: then it is asked where it stands, and killed."""
    pid, folder, timeout_s = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    silence = Silence(Beats(folder, 1), timeout_s, NUM_BEATS_OF_ONE, float(sys.argv[4]))
    while os.getppid() == pid:
        if (silent_s := silence.too_long_s()) is not None:
            ask_for_stacks([pid])
            allowed = f"train.hang_timeout_s={timeout_s:g} allows"
            if not silence.has_begun():
                allowed = "it may take until its first step is done"
            print(
                f"ERROR: nothing new has happened for {silent_s:.0f} s in process {pid}, more than "
                f"{allowed}: it is killed, where each of its threads stands is above; go on by "
                f"running the same command again",
                file=sys.stderr,
                flush=True,
            )
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
