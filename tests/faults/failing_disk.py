"""The hard experiment on a disk of which one operation fails, as a worn or overloaded one does.

``FAILING_RUN`` is the run's folder, ``FAILING_AT`` the number of the operation in it that fails;
``FAILING_COUNT`` names a file for how many there were.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import threading
from pathlib import Path

from tests.faults.hard_experiment import Hard as _Hard


class Hard(_Hard):
    """As it is."""


class _FailingDisk:
    def __init__(self, run: str, failing: int) -> None:
        self._run, self._failing = run, failing
        self._pid = os.getpid()
        self._counting = threading.Lock()
        self.num_operations = 0

    def watch(self, event: str, arguments: tuple[object, ...]) -> None:
        is_of_files = event == "open" or event.startswith("os.")
        if not is_of_files or not arguments or os.getpid() != self._pid:
            return
        if self._run not in str(arguments[0]):
            return
        with self._counting:
            self.num_operations += 1
            is_failing = self.num_operations == self._failing
        if is_failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(arguments[0]))


if _run := os.environ.get("FAILING_RUN"):
    _disk = _FailingDisk(_run, int(os.environ.get("FAILING_AT", "0")))
    sys.addaudithook(_disk.watch)
    if _count := os.environ.get("FAILING_COUNT"):
        _file = Path(_count)
        atexit.register(lambda: _file.write_text(str(_disk.num_operations)))
