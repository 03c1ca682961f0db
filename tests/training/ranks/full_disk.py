"""The hard experiment on a disk that is full for one of three ranks, so many times.

``FULL_TIMES`` says how often a file of its slices of the model cannot be made.
"""

from __future__ import annotations

import errno
import os
import sys

from tests.faults.hard_experiment import HardInShards as _HardInShards

SLICES = "model-00003-of-00003.safetensors"


class HardInShards(_HardInShards):
    """As it is."""


class _FullDisk:
    def __init__(self, num_times: int) -> None:
        self._num_left = num_times

    def watch(self, event: str, arguments: tuple[object, ...]) -> None:
        is_of_slices = event == "open" and str(arguments[0]).endswith(SLICES)
        is_made = is_of_slices and int(str(arguments[2])) & os.O_CREAT
        if is_made and self._num_left:
            self._num_left -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))


if _times := os.environ.get("FULL_TIMES"):
    sys.addaudithook(_FullDisk(int(_times)).watch)
