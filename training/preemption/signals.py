"""Signals as a flag: which ones came and when, and nothing else happens in their handler.

Only the standard library is imported, so that the flag can be up before torch is imported, which
takes seconds. Order in a segment: ``exec_held`` sets the environment by starting the program
again with the signals held back; ``install_signal_flag`` then lets them through. A signal that
came in between waits in the kernel.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

NOTICE_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_S = 0.1  # what lies closer together is one Ctrl-C that a wrapper such as timeout passed on
Handler = Callable[[int, FrameType | None], object] | int | None


@dataclass(frozen=True)
class ReceivedSignal:
    """A signal and the monotonic time at which it came."""

    name: str
    received_s: float


Listener = Callable[[ReceivedSignal], None]


class SignalFlag:
    """The signals that this process got since ``install``.

    A second SIGINT raises KeyboardInterrupt at once; a third one ends the process. Two within a
    tenth of a second count as one: the terminal sends Ctrl-C to the whole process group, and a
    wrapper (timeout, make) passes its own on.
    """

    def __init__(self) -> None:
        # Appending to a deque and replacing a tuple are atomic: no lock that a handler, which
        # interrupts the very thread that would have to let go of it, could wait for.
        self._received: deque[ReceivedSignal] = deque(maxlen=16)
        self._listeners: tuple[Listener, ...] = ()
        self._previous: dict[signal.Signals, Handler] = {}
        self._c_handlers: dict[signal.Signals, int | None] = {}
        self._theirs: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._callers: set[int] = set()
        self._pid = 0

    @property
    def is_installed(self) -> bool:
        """Whether signals reach this flag."""
        return self._pid == os.getpid()

    @property
    def first(self) -> ReceivedSignal | None:
        """The first signal that came, or None."""
        return self._received[0] if self._received else None

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGUSR1, then let through those that were held back.

        A SIGINT that the parent had ignored, as a shell does for what it starts with ``&``, stays
        ignored: Ctrl-C is meant for others. Calling it again only does the second. Raises
        ValueError outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                f"signals can be taken over in the main thread only, this is "
                f"{threading.current_thread().name}: call install_signal_flag() there first"
            )
        if not self.is_installed:
            self._pid = os.getpid()
            taken = [n for n in NOTICE_SIGNALS if n != signal.SIGINT or not _is_ignored(n)]
            self._previous = {number: signal.getsignal(number) for number in taken}
            for number in taken:
                self._take(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICE_SIGNALS)

    def reclaim(self) -> list[str]:
        """Take back signals that other code has taken over since; its handlers are called as well.

        What asyncio and ``signal.set_wakeup_fd`` are told goes on to be told: Python does that for
        any handler. A handler that was set in C can be seen and taken back, but not be called.

        Returns what was taken back, in words. Does nothing outside the main thread, or where the
        flag is not up.
        """
        is_main = threading.current_thread() is threading.main_thread()
        found = []
        for number in self._previous if self.is_installed and is_main else ():
            theirs = signal.getsignal(number)
            if theirs == self._on_signal and c_handler(number) == self._c_handlers[number]:
                continue
            if callable(theirs) and theirs not in (self._on_signal, signal.default_int_handler):
                self._theirs[number] = theirs
                name = getattr(theirs, "__qualname__", type(theirs).__name__)
                found.append(f"{number.name}, which {name} handles now")
            else:
                found.append(f"{number.name}, which something handles that cannot be called")
            self._take(number)
        return found

    def uninstall(self) -> None:
        """Put the earlier handlers back and forget everything."""
        if self.is_installed:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        self._pid = 0
        self._theirs.clear()
        self._received.clear()
        self._listeners = ()

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` for each signal, those that came before included.

        It is called from the handler, so it must not take a lock.
        """
        self._listeners = (*self._listeners, listener)
        for received in tuple(self._received):
            listener(received)

    def leave(self, listener: Listener) -> None:
        """Call ``listener`` no more."""
        self._listeners = tuple(known for known in self._listeners if known != listener)

    def _take(self, number: signal.Signals) -> None:
        signal.signal(number, self._on_signal)
        self._c_handlers[number] = c_handler(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            _act_as_child(number, frame)
            return
        if threading.get_ident() in self._callers:
            return  # their handler calls the one before it, which is this one
        received = ReceivedSignal(signal.Signals(number).name, time.monotonic())
        is_second_interrupt = number == signal.SIGINT and any(
            earlier.name == received.name and received.received_s - earlier.received_s > ECHO_S
            for earlier in tuple(self._received)
        )
        if is_second_interrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._received.append(received)
        for listener in self._listeners:
            listener(received)
        if number in self._theirs:
            # In a thread, and one that takes no lock of Python's: theirs may wait, or end.
            _thread.start_new_thread(self._call_theirs, (number, frame))

    def _call_theirs(self, number: int, frame: FrameType | None) -> None:
        self._callers.add(threading.get_ident())
        try:
            self._theirs[number](number, frame)
        except BaseException as error:  # noqa: BLE001  # it must not end this process
            name = signal.Signals(number).name
            _warn(
                f"the experiment's own handler of {name} failed, which changes nothing: {error!r}"
            )
        finally:
            self._callers.discard(threading.get_ident())


_flag = SignalFlag()


def install_signal_flag() -> SignalFlag:
    """Put up the flag of this process; later calls return the same one.

    Raises ValueError outside the main thread, where Python cannot take signals over.
    """
    _flag.install()
    return _flag


def current_signal_flag() -> SignalFlag:
    """The flag of this process, installed or not."""
    return _flag


def reclaim_signals(when: str) -> None:
    """Have the flag of this process take its signals back, and say so where it had to."""
    for taken in _flag.reclaim():
        _warn(
            f"the experiment, or a library that it uses, took over {taken} (seen {when}); notices "
            f"are heard first again, and a handler of Python's is called as well, in a thread"
        )


def hold_signals() -> None:
    """Keep notice signals waiting in the kernel until ``install_signal_flag``.

    Threads and processes that are started afterwards inherit this. To be called before the first
    thread is started: the kernel gives a signal to any thread that does not hold it back.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTICE_SIGNALS)


def release_signals() -> None:
    """Let notice signals through again, to what they do by default: a program without a flag."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICE_SIGNALS)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold notice signals back in this thread, as around the start of loader processes.

    A child that is started here begins with the signals held back, so that one which is sent to
    the whole process group cannot end it before it has called ``ignore_in_worker``. Call
    ``multiprocessing.resource_tracker.ensure_running()`` first: when multiprocessing starts its
    tracker within the block, it lets SIGINT and SIGTERM through again.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICE_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exec_held(command: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this program by ``command`` with that environment, same process id.

    Notice signals are held back from here on; the new program gets them when it calls
    ``install_signal_flag``. Raises OSError if it cannot be started; then nothing has changed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with signals_held():
        os.execve(command[0], command, dict(environment))


def ignore_in_worker() -> None:
    """Make a loader process live until its owner closes it; to be called in that process.

    Ctrl-C and cluster managers signal the whole process group, but the training process still
    needs its loader processes to finish the step. SIGINT and SIGUSR1 are ignored. SIGTERM counts
    only from the process that made this one, as ``Process.terminate`` sends it, and from anybody
    once that process is gone. A handler cannot see the sender, therefore a thread waits for the
    signal and looks. Main thread only.
    """
    parent = os.getppid()  # at once, for it may be gone in a moment
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Blocked in this thread and in all that it starts, so that only the thread below gets it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGUSR1})
    threading.Thread(
        target=_end_on_owners_sigterm, args=(parent,), name="holdfast-sigterm", daemon=True
    ).start()


def _end_on_owners_sigterm(parent: int) -> None:
    # With a fork server the parent is the server; multiprocessing still knows who asked for us.
    import multiprocessing  # not needed at the start, where every millisecond counts

    owner = multiprocessing.parent_process()
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        is_orphan = os.getppid() != parent if owner is None else not owner.is_alive()
        if is_orphan or sender == (parent if owner is None else owner.pid):
            os._exit(0)


def c_handler(number: int) -> int | None:
    """The address of what the kernel calls for a signal; None where it cannot be asked.

    ``struct sigaction`` begins with it on Linux.
    """
    import ctypes  # it takes longer to import than all else here, and signals wait to be held

    action = ctypes.create_string_buffer(256)
    try:
        failed: int = ctypes.CDLL(None).sigaction(int(number), None, action)
    except (OSError, AttributeError):
        return None
    address = action.raw[: ctypes.sizeof(ctypes.c_void_p)]
    return None if failed else int.from_bytes(address, sys.byteorder)


def _warn(message: str) -> None:
    import logging  # as ctypes above

    logging.getLogger(__name__).warning("%s", message)


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def _act_as_child(number: int, frame: FrameType | None) -> None:
    """A forked process inherits the handler, but the notice is not its own to act on.

    It behaves as if nobody had touched its signals, so that whoever started it can end it.
    """
    if number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
