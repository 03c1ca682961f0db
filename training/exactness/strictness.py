"""Warnings about exactness, which are errors where ``--strict`` asks for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from holdfast.training.errors import InexactError

logger = logging.getLogger(__name__)

_is_strict: ContextVar[bool] = ContextVar("is_strict", default=False)


@contextmanager
def strictness(is_strict: bool) -> Iterator[None]:
    """Whether warnings about exactness are errors within the block, in this thread."""
    before = _is_strict.set(is_strict)
    try:
        yield
    finally:
        _is_strict.reset(before)


def be_strict() -> None:
    """Warnings about exactness are errors from now on, in this thread."""
    _is_strict.set(True)


def warn_of_inexactness(message: str) -> None:
    """Tell that the result will, or may, not be that of an uninterrupted run on this machine.

    Raises InexactError instead where warnings are errors.
    """
    if _is_strict.get():
        raise InexactError(f"{message} (--strict makes this warning an error)")
    logger.warning("%s", message)
