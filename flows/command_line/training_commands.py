"""Run a command of ``python -m holdfast.training`` for a command of ``holdfast``.

The command line must not import torch; what needs it is done by a process that does.
"""

from __future__ import annotations

import subprocess

from holdfast.training.exactness.reproducibility import python_command


def call_training(arguments: list[str]) -> int:
    """Run ``python -m holdfast.training ...`` with this terminal; its exit code."""
    return subprocess.run(python_command("holdfast.training", *arguments), check=False).returncode
