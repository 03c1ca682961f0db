"""What a loader process is born from, and how it is set up before it fetches.

Loader processes come from a fork server: the training process has threads (the background
saver, monitors, torch's own), and a fork of it may inherit a lock that nobody will ever release.
The server imports torch once, so that a loader process starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker, util

import torch

from holdfast.training.errors import InputError

MAX_FOLDER_BYTES = 70  # multiprocessing adds "/pymp-12345678/listener-12345678"
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # of these, a folder of our own
NOTICE_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def start_fork_server() -> None:
    """Start the process that loader processes are forked from, unless it runs; returns at once.

    It and its children are born with the notices' signals blocked, so that a signal to the whole
    process group cannot end them before they have a chance to ignore it. For the caller nothing
    is lost: a signal that arrives meanwhile is delivered right after. The server ends when the
    process that started it and all loader processes have ended.
    """
    _shorten_temporary_folder()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["holdfast.training.data.fetching", __name__])
    # It unblocks SIGINT and SIGTERM once it is up, so it goes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICE_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shorten_temporary_folder() -> None:
    """Have multiprocessing put its sockets where their paths fit: a name has at most 107 bytes.

    Batch systems set a long TMPDIR. The folder is removed when this process ends; its children
    inherit it. Raises InputError where no folder is short enough.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= MAX_FOLDER_BYTES:
        return
    before = tempfile.tempdir
    for folder in SHORT_FOLDERS:
        if os.access(folder, os.W_OK | os.X_OK):
            tempfile.tempdir = folder
            try:
                util.get_temp_dir()  # made once a process
            finally:
                tempfile.tempdir = before
            return
    raise InputError(
        f"TMPDIR = {tempfile.gettempdir()} is too long for a socket, and none of "
        f"{', '.join(SHORT_FOLDERS)} can be written: set TMPDIR to a path of at most "
        f"{MAX_FOLDER_BYTES} characters, or data.num_workers=0"
    )


@dataclass(frozen=True)
class WorkerSetup:
    """A ``worker_init_fn``: gives a loader process the settings that a fork would have inherited.

    Signals of a notice are ignored: the training process decides what to do, and ends its loader
    processes when it has done it. When the training process is gone, however it went, the loader
    process goes, too: DataLoader's own watch looks at its parent, which is the fork server, and
    that in turn lives as long as its children do.
    """

    default_type: torch.dtype
    deterministic_mode: int
    num_threads: int
    then: Callable[[int], None] | None

    @classmethod
    def here(cls, then: Callable[[int], None] | None = None) -> WorkerSetup:
        """The settings of this process; ``then`` is called last, with the worker's number."""
        mode = torch.get_deterministic_debug_mode()
        return cls(torch.get_default_dtype(), mode, torch.get_num_threads(), then)

    def __call__(self, worker: int) -> None:
        """Set up this process."""
        for number in NOTICE_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICE_SIGNALS)
        threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
        # As in the training process, for a long sum rounds differently with other threads. One
        # thread for each fetch there would cost more than the fetch: torch forgets its prepared
        # kernels whenever the number of threads is set.
        torch.set_num_threads(self.num_threads)
        torch.set_default_dtype(self.default_type)
        # use_deterministic_algorithms would do the same after importing the compiler for a second.
        torch.set_deterministic_debug_mode(self.deterministic_mode)
        if self.then is not None:
            self.then(worker)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
