"""What happens at the end of a script's process, however it ends."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, TextIO

from holdfast.training.distributed.seat import own_seat
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.experiment.error_places import with_users_place
from holdfast.training.told_errors import error_line

End = Callable[[BaseException | None], HoldfastError | None]
Cause = Callable[[BaseException], BaseException]


current: Ending | None = None
"""That of this process."""


class ScriptEndedError(HoldfastError):
    """The script itself ended with an exit code that says that it failed."""


class Ending:
    """Tells a script's error in one line where it is one of ours, and lets the run go.

    Made before anything can fail. ``watch`` names what is called once, when the script has raised
    or the interpreter leaves: it is given the error, or None, and returns what is wrong where the
    script itself ended well. In a process that the script has forked the run is left alone.
    """

    def __init__(self) -> None:
        global current  # whoever started the script knows the exit code that it leaves with
        current = self
        self._end: End = lambda _: None
        self._cause: Cause = lambda error: error
        self._pid = os.getpid()
        self._theirs = sys.excepthook
        self._has_raised = False
        sys.excepthook = self._on_error
        self._theirs_of_threads = threading.excepthook
        threading.excepthook = self._on_thread_error
        atexit.register(self._on_exit)

    def watch(self, end: End, cause: Cause) -> None:
        """Call ``end`` at the end, with what ``cause`` says of the error that was raised."""
        self._end, self._cause = end, cause

    def _on_error(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if os.getpid() == self._pid:
            error = self._cause(error)
        is_ours = isinstance(error, HoldfastError)
        if not is_ours:
            with contextlib.redirect_stderr(_stderr()):  # at once, while there is a log
                self._theirs(kind, error, traceback)
        if os.getpid() == self._pid:
            self._has_raised = True
            self._end(error)
        if is_ours:
            assert isinstance(error, HoldfastError)
            if own_seat() is None:  # else it is told by whoever started the processes
                print(error_line(with_users_place(error)), file=_stderr())
            _leave(error.exit_code)

    def _on_thread_error(self, failed: threading.ExceptHookArgs) -> None:
        """A thread that uses the run wrongly ends the process; its own errors are its own."""
        if isinstance(failed.exc_value, HoldfastError):
            self._on_error(failed.exc_type, failed.exc_value, failed.exc_traceback)
        else:
            self._theirs_of_threads(failed)

    def _on_exit(self) -> None:
        if os.getpid() != self._pid or self._has_raised:
            return
        wrong = self._end(None)
        if wrong is not None:
            print(error_line(wrong), file=_stderr())
            _leave(wrong.exit_code)

    def left_with(self, code: int) -> None:
        """The script leaves by itself, and says that it failed."""
        self._has_raised = True
        self._end(ScriptEndedError(f"the script ended with exit code {code}"))


def tell_in_one_line() -> None:
    """Let errors of ours end this process with one line, also where no run has begun."""
    if current is None:
        Ending()


def leave_fork(what: str) -> NoReturn:
    """End a process that the script has forked, and that uses the run of its parent.

    Past what waits for errors there, as multiprocessing does to print where they came from.
    """
    told = f"{what} was called in a process that the script forked: the run is that of the process "
    print(error_line(f"{told}which called holdfast.run; use it there"), file=_stderr())
    _leave(InputError.exit_code)


def _stderr() -> TextIO:
    """Standard error, past torch.distributed's excepthook, which gathers what others print.

    It tells that when they return, and ours does not.
    """
    gathers = isinstance(sys.stderr, io.StringIO)
    return sys.__stderr__ if gathers and sys.__stderr__ is not None else sys.stderr


def _leave(code: int) -> NoReturn:
    """An exit code cannot be changed in any other way by now."""
    sys.stdout.flush()
    _stderr().flush()
    os._exit(code)
