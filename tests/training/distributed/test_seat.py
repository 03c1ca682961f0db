"""What a process knows of its place among several."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from holdfast.training.distributed import seat
from holdfast.training.distributed.seat import Seat, own_seat, take_seat


def test_what_a_rank_starts_is_no_rank_once_it_has_taken_its_seat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seat, "_taken", None)
    given = Seat(2, 3, "127.0.0.1", 29400, os.getpid(), "folder", 60.0, 0, 3)
    for name, value in given.environment().items():
        monkeypatch.setenv(name, value)
    assert take_seat() == own_seat() == given
    code = f"from {seat.__name__} import own_seat; print(own_seat())"
    said = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert said.stdout.decode().strip() == "None"
