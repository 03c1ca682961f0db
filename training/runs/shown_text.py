"""Text from elsewhere, shown as text: it moves no cursor, ends no line and hides nothing.

Names, metrics and reasons come out of files that a stranger may have written. What they hold
beside printable characters and no-break spaces is shown by its code, as in ``\\x1b[2J``, and their
length has an end.

Imports the standard library alone.
"""

from __future__ import annotations

import logging

MAX_CHARS = 2000
NO_BREAK_SPACES = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"


def shown(value: object, max_chars: int = MAX_CHARS) -> str:
    """``str(value)`` on one line of printable characters, cut where it is longer."""
    text = str(value)
    cut = text if len(text) <= max_chars else f"{text[:max_chars]}…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() or c in NO_BREAK_SPACES else _code(c) for c in cut)


def shown_lines(value: object) -> str:
    """As ``shown``, for words of several lines: each of them is kept, however long it all is."""
    text = str(value)
    if text.isprintable():
        return text
    return "\n".join(shown(line, len(line)) for line in text.split("\n"))


class ShownFormatter(logging.Formatter):
    """Log lines whose parts are shown as text."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines."""
        return shown_lines(super().format(record))


def _code(character: str) -> str:
    return ascii(character)[1:-1]
