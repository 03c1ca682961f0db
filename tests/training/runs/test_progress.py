"""Events reach their reader whole, also where output is unbuffered."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from holdfast.training.exactness.reproducibility import child_environment

TELL = "holdfast.training.runs.progress"


@pytest.mark.parametrize(("format", "descriptor"), [("jsonl", 1), ("text", 2)])
def test_a_line_is_written_in_one_piece_where_output_is_unbuffered(
    format: str, descriptor: int
) -> None:
    code = f"from {TELL} import Progress; Progress({format!r}).emit('saved', step=7)"
    # Packets: a read gives what one write wrote, and a kill comes between two of them.
    reading, writing = os.pipe2(os.O_DIRECT)
    try:
        subprocess.run(
            [sys.executable, "-P", "-c", code],
            check=True,
            env={**child_environment(1), "PYTHONUNBUFFERED": "1"},
            **{"stdout" if descriptor == 1 else "stderr": writing},
        )
        assert os.read(reading, 4096).endswith(b"\n")
    finally:
        os.close(reading)
        os.close(writing)
