"""Who hangs: does nothing new for too long. The launcher watches several, a small process one.

    python -m holdfast.training.distributed.watchdog PID FOLDER TIMEOUT_S

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
from collections.abc import Callable, Iterable, Iterator
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

    def __init__(self, beats: Beats, timeout_s: float, num_beats_of_start: int) -> None:
        """Until each process has beaten so often, it is starting, and may be silent for longer."""
        self._beats = beats
        self._timeout_s = timeout_s
        self._num_beats_of_start = num_beats_of_start
        self._seen, self._seen_s = beats.all(), time.monotonic()

    def has_begun(self) -> bool:
        """Whether none is starting any more."""
        return min(self._seen) >= self._num_beats_of_start

    def too_long_s(self) -> float | None:
        """For how long nothing has happened, where that is more than is allowed; None else."""
        now_s = time.monotonic()
        allowed_s = self._timeout_s if self.has_begun() else max(self._timeout_s, STARTING_S)
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


@contextlib.contextmanager
def watched(timeout_s: float | None) -> Iterator[Callable[[], None]]:
    """Within the block, this process is killed where nothing new happens for so long.

    What is yielded is to be called where something new happens; it takes less than a microsecond.
    None watches nothing.
    """
    if timeout_s is None:
        yield lambda: None
        return
    answer_for_stacks()
    with tempfile.TemporaryDirectory(prefix="holdfast-beats-") as folder:
        beats = Beats(Path(folder), 1)
        command = python_command(__name__, str(os.getpid()), folder, str(timeout_s))
        # Signals to the terminal's group are not for it, and it ends with what it watches.
        watchdog = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            yield lambda: beats.beat(0)
        finally:
            watchdog.kill()
            watchdog.wait()


def main() -> None:
    """Watch until the process has ended, or hangs: then it is asked where it stands, and killed."""
    pid, folder, timeout_s = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    silence = Silence(Beats(folder, 1), timeout_s, NUM_BEATS_OF_ONE)
    while os.getppid() == pid:
        if (silent_s := silence.too_long_s()) is not None:
            ask_for_stacks([pid])
            print(
                f"ERROR: nothing new has happened for {silent_s:.0f} s in process {pid}, more than "
                f"train.hang_timeout_s={timeout_s:g} allows: it is killed, where each of its "
                f"threads stands is above; go on by running the same command again",
                file=sys.stderr,
                flush=True,
            )
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
