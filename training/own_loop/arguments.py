"""What a script hands to the functions of its run: refused at once, in one line, where it is wrong.

Each function returns the value, or raises InputError that says what was expected and found.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from holdfast.training.errors import InputError, kind_of
from holdfast.training.runs.shown_text import shown

MAX_SHOWN_CHARS = 60


def found(value: object) -> str:
    """A value in a message: what it is, and itself where that is short."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    is_short = isinstance(value, (str, int, float, np.generic))
    return (
        f"{kind_of(value)}, {shown(repr(value), MAX_SHOWN_CHARS)}" if is_short else kind_of(value)
    )


def indexed(root: str, path: str) -> str:
    """A place below a value, as one writes it: ``config["sizes"][0]`` of ``sizes/0``."""
    names = path.split("/") if path else []
    return root + "".join(f"[{n}]" if n.isdecimal() else f'["{n}"]' for n in names)


def whole_number(what: str, value: object, at_least: int) -> int:
    """A whole number that is large enough. ``what``: the call, as ``run.steps(…)``."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or int(value) < at_least:  # type: ignore[call-overload]
        raise InputError(
            f"{what}: expected a whole number of at least {at_least}, found {found(value)}"
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def flag(what: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{what}: expected True or False, found {found(value)}")
    return bool(value)


def text(what: str, value: object) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{what}: expected a text, found {found(value)}")
    return value


def path(what: str, value: object) -> None:
    """A path, as text or as one."""
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{what}: expected a path, found {found(value)}")


def function(what: str, value: object) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise InputError(f"{what}: expected a function, found {found(value)}")


def module(what: str, value: object) -> None:
    """A module."""
    if not isinstance(value, nn.Module):
        raise InputError(f"{what}: expected a module, found {found(value)}")


def mapping(what: str, value: object, of_what: str) -> Mapping[Any, Any]:
    """A dict, or None for an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{what}: expected a dict of {of_what}, found {found(value)}")
    return value


def scalar(what: str, value: Any) -> Any:
    """A number, or a tensor with one, as it is; what waits for a device is not asked here."""
    if isinstance(value, (Tensor, np.ndarray)):
        if (value.numel() if isinstance(value, Tensor) else value.size) == 1:
            return value if isinstance(value, Tensor) else value.item()
        raise InputError(f"{what}: expected a number, found {found(value)}: take its mean()")
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, Real):
        raise InputError(f"{what}: expected a number, found {found(value)}")
    return value
