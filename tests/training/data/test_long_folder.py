"""Sockets of loader processes fit into their names, however long TMPDIR is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing.util, os, sys, tempfile
from holdfast.training.data import loader_process
from holdfast.training.errors import InputError
loader_process.SHORT_FOLDERS = tuple(sys.argv[1:])
try:
    loader_process.start_fork_server()
except InputError as error:
    sys.exit(str(error))
print(multiprocessing.util.get_temp_dir(), tempfile.gettempdir())
"""


def started(folder: Path, *short: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *short],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 200])
def test_the_sockets_lie_where_their_names_are_short(length: int, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * length)
    folder.mkdir()
    done = started(folder, "/nowhere", "/tmp")
    own, general = done.stdout.split()
    assert general == str(folder)
    is_long = len(str(folder)) > 70
    assert own.startswith("/tmp/pymp-" if is_long else str(folder))
    assert not Path(own).exists()  # removed at the end


def test_where_no_folder_is_short_enough_one_line_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    done = started(folder, "/nowhere")
    assert done.returncode == 1
    assert "is too long for a socket" in done.stderr
    assert done.stderr.rstrip().endswith("or data.num_workers=0")
