"""Starts a script as ``python train.py`` or ``python -m train`` does, for ``holdfast exec``.

usage: python path/to/started.py train.py [argument ...]
       python path/to/started.py -m train [argument ...]

What Python leaves untold is told: why the script ended, for whoever starts it again, in the file
that HOLDFAST_OUTCOME names. An error with which no start of it can go well, before anything is
trained, is one line. Run as a file, so that the script has the flags and the ``sys.path`` that it
would have had. Imports the standard library alone until the script has ended.
"""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path
from typing import Any

SURE_ERRORS = (SyntaxError, ImportError, NameError, AttributeError, TypeError)
"""Of the program: the same start ends with them again."""
ONE_LINE_ERRORS = (SyntaxError, ImportError)
EXIT_BAD_INPUT = 2


def start(arguments: list[str]) -> None:
    """Run the script, and leave as it does. Raises SystemExit, KeyboardInterrupt."""
    try:
        if arguments[0] == "-m":
            _run_module(arguments[1], arguments[2:])
        else:
            _run_file(arguments[0], arguments)
    except SystemExit as leaving:
        _note_exit(leaving)
        raise
    except Exception as error:  # noqa: BLE001 - a program's own, which Python would print
        _leave_with(error)


def _run_file(path: str, arguments: list[str]) -> None:
    if not sys.flags.safe_path:  # in the place of this file's
        sys.path[0] = str(Path(path).resolve().parent)
    sys.argv = arguments
    module = types.ModuleType("__main__")
    module.__file__ = str(Path(path).absolute())
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module  # and stays, for what runs at exit
    code = compile(Path(path).read_bytes(), module.__file__, "exec", dont_inherit=True)
    exec(code, module.__dict__)


def _run_module(name: str, arguments: list[str]) -> None:
    if not sys.flags.safe_path:
        sys.path[0] = str(Path.cwd())
    sys.argv = ["-m", *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _note_exit(leaving: SystemExit) -> None:
    """A run that goes on must not take it for an end without a reason."""
    ending: Any = sys.modules.get("holdfast.training.own_loop.ending")
    if leaving.code and ending is not None and ending.current is not None:
        ending.current.left_with(leaving.code)


def _leave_with(error: Exception) -> None:
    from holdfast.training.experiment.error_places import named, users_place
    from holdfast.training.own_loop.environment import note_outcome
    from holdfast.training.told_errors import error_line

    place = users_place(error)
    told = f"{named(error)} ({place})" if place else named(error)
    if isinstance(error, SyntaxError):
        told = _syntax(error)
    is_sure = isinstance(error, SURE_ERRORS)
    note_outcome(error=told, is_sure=is_sure)
    if isinstance(error, ONE_LINE_ERRORS) and sys.excepthook is sys.__excepthook__:
        print(error_line(told), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    # Without the frames of this file.
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)
    sys.exit(1)


def _syntax(error: SyntaxError) -> str:
    line = " ".join((error.text or "").split())
    return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno}: {line})"


if __name__ == "__main__":
    start(sys.argv[1:])
