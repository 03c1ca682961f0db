"""Operators that torch has no deterministic kernel of, and the user's line that calls one."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from holdfast.training.errors import ExperimentError
from holdfast.training.experiment.error_places import is_users, users_place

REFUSED = re.compile(r"(\S+) does not have a deterministic implementation")
FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)')


def naming_operators(step: Callable[[], None]) -> None:
    """Do a step. Raises ExperimentError that names an operator, its place, and the way out."""
    try:
        step()
    except RuntimeError as error:
        refused = REFUSED.search(str(error))
        if refused is None:
            raise
        place = users_place(error) or _forward_place(step)
        raise ExperimentError(
            f"{refused[1]} has no deterministic implementation on this device "
            f"({place or 'it is not known who calls it'}): use another operator there, or give "
            "exactness up with train.mode=speed"
        ) from error


def _forward_place(step: Callable[[], None]) -> str:
    """Where the user called what fails on the way back; empty where that is not told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        anomalies = torch.autograd.set_detect_anomaly(True, check_nan=False)
        with anomalies, contextlib.suppress(RuntimeError):
            step()
    frames = FRAME.findall("\n".join(str(warning.message) for warning in told))
    users = [frame for frame in frames if is_users(Path(frame[0]))]
    return "{}:{} in {}".format(*users[-1]) if users else ""
