"""A save that is in flight when the interpreter leaves is written all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from holdfast.training.checkpointing.digests import digest_of

PROGRAM = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from holdfast.training.checkpointing.local_files import FileWriter

def save():
    time.sleep(1.0)  # the last line is long done
    with ThreadPoolExecutor(3) as pool:
        print(FileWriter(pool).write(Path(sys.argv[1]), [b"weights"]).digest())

ThreadPoolExecutor(1).submit(save)
"""


def test_a_file_is_written_after_the_last_line_of_a_program(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, digest_of([b"weights"])), done.stderr
    assert path.read_bytes() == b"weights"
