"""The log of a segment: all of standard error, bounded, and nothing lost to the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.training.runs.segment_log import (
    MAX_WAITING_BYTES,
    BoundedFile,
    Waiting,
    log_path,
)

PROGRAM = """
import faulthandler, logging, os, signal, subprocess, sys
from pathlib import Path
from holdfast.training.runs.segment_log import segment_log
logging.basicConfig(level=logging.INFO)
print("before", file=sys.stderr)
with segment_log() as log:
    log.open(Path(sys.argv[1]))
    print("printed", file=sys.stderr)
    logging.info("logged")
    os.write(2, b"from C\\n")
    subprocess.run(["sh", "-c", "echo from a child >&2"])
    log.write("kept only")
    {end}
print("after", file=sys.stderr)
"""
KEPT = ["printed", "INFO:root:logged", "from C", "from a child"]


def run(path: Path, end: str = "pass") -> tuple[int, list[str]]:
    program = PROGRAM.replace("{end}", end)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()


def lines_of(path: Path, last: str) -> list[str]:
    """The lines, once the last one is there: the keeper outlives a process that is killed."""
    deadline_s = time.monotonic() + 20
    while not (path.is_file() and last in path.read_text()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return path.read_text().splitlines()


def test_all_of_standard_error_is_kept_and_still_shown(tmp_path: Path) -> None:
    path = log_path(tmp_path / "logs", 1)
    code, shown = run(path)
    assert code == 0
    assert shown == ["before", *KEPT, "after"]
    kept = path.read_text().splitlines()
    assert sorted(kept) == sorted([*KEPT, "kept only"])
    assert path.name == "segment-0001.log"


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "from a child"),
        ("faulthandler.enable(); os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, "Fatal"),
        ("1 / 0", 1, "from a child"),
    ],
)
def test_last_words_are_kept_and_shown_however_the_process_ends(
    end: str, code: int, last: str, tmp_path: Path
) -> None:
    path = tmp_path / "one.log"
    found, shown = run(path, end)
    assert found == code
    assert [line for line in shown if line in KEPT] == KEPT
    assert any(last in line for line in shown)
    assert any(last in line for line in lines_of(path, last))


def test_a_log_that_cannot_be_kept_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, shown = run(tmp_path / "file" / "one.log")
    assert code == 0
    assert "WARNING: no log is kept" in shown[1]
    assert shown[-1] == "after"
    path = tmp_path / "folder"
    path.mkdir()
    code, shown = run(path)
    assert code == 0
    assert any("is incomplete" in line for line in shown)


def test_a_long_log_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    file = BoundedFile(path, head_bytes=100, tail_bytes=200)
    num_lines = 500
    for number in range(num_lines):
        file.append(f"line {number:05d}\n".encode())
        assert path.stat().st_size < 100 + 2 * 200 + 120
    lines = path.read_text().splitlines()
    assert lines[0] == "line 00000"
    assert lines[-1] == f"line {num_lines - 1:05d}"
    [mark] = [line for line in lines if "left out" in line]
    num_kept = sum(len(line) + 1 for line in lines if line.startswith("line") or line == "l")
    num_left_out = int(mark.split()[1])
    assert abs(num_left_out + num_kept - 11 * num_lines) < 12
    assert sorted(tmp_path.iterdir()) == [path]


def test_it_ends_while_somebody_else_holds_the_pipe(tmp_path: Path) -> None:
    lingering = "child = subprocess.Popen(['sleep', '30'])"
    start_s = time.monotonic()
    path = tmp_path / "one.log"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM.replace("{end}", lingering), str(path)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.wait(25) == 0
    os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - start_s < 25
    assert "from a child" in path.read_text()


def test_what_waits_for_a_slow_store_is_counted_in_bytes_not_in_pieces() -> None:
    waiting = Waiting()
    for _ in range(10_000):  # as a stack comes, word by word
        waiting.put(b"word ")
    waiting.put(bytes(MAX_WAITING_BYTES))  # too much: the terminal has it
    waiting.put(b"last")
    assert waiting.take() == b"word " * 10_000 + b"last"
    waiting.end()
    assert waiting.take() == b""
