"""Where in a user's code an error arose, for messages of one line."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

MAX_MESSAGE_CHARS = 600
_OWN_FOLDER = Path(__file__).resolve().parents[1]
_FOREIGN_FOLDERS = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")
)


def error_place(error: BaseException) -> str:
    """The innermost line of a user's code that an error came through, as ``file:line in name``.

    A user's code is neither of Python, nor of an installed package, nor of Holdfast itself, save
    for the experiments that come with it. Where no such line is there, the innermost one of all;
    empty for an error that was never raised.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
    ]
    frames = [frame for frame in frames if _is_users(Path(frame.filename))] or frames
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def described(error: BaseException) -> str:
    """An error's type, message and place, in one line. A long message is cut."""
    message = " ".join(str(error).split())
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}…"
    named = f"{type(error).__name__}: {message}" if message else type(error).__name__
    place = error_place(error)
    return f"{named} ({place})" if place else named


def _is_users(path: Path) -> bool:
    path = path.resolve()
    if path.is_relative_to(_OWN_FOLDER):
        return path.is_relative_to(_OWN_FOLDER / "experiments")
    return not any(path.is_relative_to(folder) for folder in _FOREIGN_FOLDERS)
