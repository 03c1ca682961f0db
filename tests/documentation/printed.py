"""Commands as they are printed in a page, and what the page says that they print.

A block of code is named by a comment above it, ``<!-- tested: name -->``; a block of output by
``<!-- output: name -->``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BLOCK = re.compile(r"(?:<!-- (tested|output): (.+?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"\b[0-9a-f]{64}\b|-?\d+(?:\.\d+)?(?:e-?\d+)?")


def blocks(page: Path, kind: str = "tested") -> dict[str, str]:
    """The named blocks of a page."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return {name: code for mark, name, _, code in found if mark == kind}


def unnamed_commands(page: Path) -> list[str]:
    """Blocks of shell commands that no comment names."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for mark, _, language, code in found if language == "bash" and not mark]


def without_numbers(text: str) -> list[str]:
    """Lines with a mark for every number and digest: what a machine does not change."""
    return [NUMBER.sub("#", line).rstrip() for line in text.strip().splitlines()]


def run_script(
    folder: Path, script: str, environment: dict[str, str], timeout_s: float
) -> tuple[str, str]:
    """Run commands in one shell of their own that stops at the first failure: stdout and stderr."""
    variables = {**environment, "OMP_NUM_THREADS": "1"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    paths = folder / "output", folder / "errors"
    with paths[0].open("wb") as output, paths[1].open("wb") as errors:
        shell = subprocess.Popen(
            ["bash", "-e", "-c", script],
            cwd=folder,
            env=variables,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = shell.wait(timeout=timeout_s)
        finally:
            _end(shell)
    told, complaints = (path.read_text(errors="replace") for path in paths)
    logs = [path.read_text() for path in sorted(folder.glob("*.log"))]
    assert code == 0, "\n".join([f"exit code {code}", told, complaints, *logs])
    return told, complaints


def save_programs(page: Path, folder: Path) -> None:
    """Save the blocks that are named as files, as the page asks its reader to."""
    for name, code in blocks(page).items():
        if name.endswith(".py"):
            (folder / name).write_text(code)


def what_differs(page: Path, names: Sequence[str], told: dict[str, str]) -> list[str]:
    """Names of the blocks whose output is not what the page shows, numbers aside."""
    shown = blocks(page, "output")
    return [name for name in names if without_numbers(shown[name]) != without_numbers(told[name])]


def _end(shell: subprocess.Popen[bytes]) -> None:
    if shell.poll() is None:
        os.killpg(shell.pid, signal.SIGTERM)
        try:
            shell.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
