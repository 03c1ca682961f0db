"""Where in a user's code an error arose, for messages of one line."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

MAX_MESSAGE_CHARS = 600
_OWN_FOLDER = Path(__file__).resolve().parents[1]
_OWN_FOLDERS = (_OWN_FOLDER, *(_OWN_FOLDER.with_name(name) for name in ("tasks", "flows")))
_FOREIGN_FOLDERS = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")
)
_PACKAGE_FOLDERS = frozenset(("site-packages", "dist-packages"))


def error_place(error: BaseException) -> str:
    """The innermost line of a user's code that an error came through, as ``file:line in name``.

    A user's code is neither of Python, nor of an installed package, nor of Holdfast itself, save
    for the experiments that come with it. Where no such line is there, the innermost one of all;
    empty for an error that was never raised.
    """
    frames = _frames(error)
    frames = [frame for frame in frames if is_users(Path(frame.filename))] or frames
    return _place(frames)


def users_place(error: BaseException) -> str:
    """As ``error_place``; empty where the error came through no line of the user's."""
    return _place([frame for frame in _frames(error) if is_users(Path(frame.filename))])


def with_users_place(error: BaseException) -> str:
    """What an error says, and behind it where it came from."""
    place = users_place(error)
    return f"{error} ({place})" if place else str(error)


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Those that are lines of files."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith("<")]


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The last one."""
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def described(error: BaseException) -> str:
    """An error's type, message and place, in one line. A long message is cut."""
    place = error_place(error)
    return f"{named(error)} ({place})" if place else named(error)


def named(error: BaseException) -> str:
    """An error's type and message, in one line. A long message is cut."""
    message = " ".join(str(error).split())
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}…"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_users(path: Path) -> bool:
    """Whether a file is a user's: not of Python, of a package, or of Holdfast itself."""
    path = path.resolve()
    if any(path.is_relative_to(folder) for folder in _OWN_FOLDERS):
        return path.is_relative_to(_OWN_FOLDER / "experiments")
    if not _PACKAGE_FOLDERS.isdisjoint(path.parts):  # of another environment that is borrowed from
        return False
    return not any(path.is_relative_to(folder) for folder in _FOREIGN_FOLDERS)
