"""What a command says of an error, and the exit code that it ends with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.runs.shown_text import shown

EXIT_INTERRUPTED = 130


def error_line(error: object) -> str:
    """One line, whatever the error's text holds."""
    return f"error: {shown(' '.join(str(error).splitlines()))}"


@contextmanager
def told_errors(exit_code: int | None = None, hint: str = "") -> Iterator[None]:
    """End with one line on stderr; with the error's own exit code unless another is named.

    ``hint`` says what to do about an error that is none of the input.
    """
    try:
        yield
    except HoldfastError as error:
        print(error_line(error) + ("" if isinstance(error, InputError) else hint), file=sys.stderr)
        sys.exit(exit_code or error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
