"""The log of a segment: all that it writes to standard error, in a file of bounded size.

Standard error becomes a pipe to a small process of its own, which passes everything on to where it
went before, and keeps it: so what C libraries, loader processes and a dying interpreter say is
kept too, and nothing is lost to the terminal, however this process ends. The keeper forwards
first and writes later, in a thread: a store that hangs never holds training up.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from holdfast.training.exactness.reproducibility import python_command

HEAD_BYTES = 512 * 1024
TAIL_BYTES = 512 * 1024
CHUNK_BYTES = 64 * 1024
MAX_WAITING_BYTES = 4 * 1024 * 1024
CLOSE_S = 2.0
LEFT_OUT = b"\n[... %d bytes left out: the log of a segment keeps its beginning and its end ...]\n"
STDIN, STDOUT, STDERR = 0, 1, 2


def log_path(folder: Path, segment: int, rank: int = 0) -> Path:
    """Where the log of a segment lies, or of a later rank of it; segments begin with 1."""
    of_rank = f"-rank-{rank}" if rank else ""
    return folder / f"segment-{segment:04d}{of_rank}.log"


class SegmentLog:
    """Keeps standard error from ``open`` on, until ``close``.

    Attributes:
        takes_stdout: standard output goes where standard error goes, and is kept, too.
    """

    def __init__(self) -> None:
        self.takes_stdout = False
        self._keeper: subprocess.Popen[bytes] | None = None
        self._stderr = -1

    def open(self, path: Path) -> None:
        """Begin to keep. Where the log cannot be kept, that is told, and nothing else happens."""
        assert self._keeper is None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._start(path)
        except OSError as error:
            print(f"WARNING: no log is kept: {error}", file=sys.stderr)

    def write(self, line: str) -> None:
        """Keep a line that is not for the terminal."""
        if self._keeper is not None:
            assert self._keeper.stdin is not None
            with contextlib.suppress(OSError):
                self._keeper.stdin.write(f"{line}\n".encode())
                self._keeper.stdin.flush()

    def close(self) -> None:
        """All that was said so far is in the file and in the terminal after return."""
        if self._keeper is None:
            return
        self._redirect(self._stderr)
        os.close(self._stderr)
        keeper, self._keeper = self._keeper, None
        assert keeper.stdin is not None
        with contextlib.suppress(OSError):
            keeper.stdin.close()  # the keeper's sign that this is all
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.wait(CLOSE_S)

    def _start(self, path: Path) -> None:
        reading, writing = os.pipe()
        try:
            self._keeper = subprocess.Popen(
                python_command(__name__, str(path), str(reading)),
                stdin=subprocess.PIPE,
                pass_fds=(reading,),
                start_new_session=True,  # signals to the terminal's group are not for it
            )
            self._stderr = os.dup(STDERR)
            self._redirect(writing)
        finally:
            os.close(reading)
            os.close(writing)

    def _redirect(self, descriptor: int) -> None:
        sys.stderr.flush()
        os.dup2(descriptor, STDERR)
        if self.takes_stdout:
            sys.stdout.flush()
            os.dup2(descriptor, STDOUT)


@contextlib.contextmanager
def segment_log() -> Iterator[SegmentLog]:
    """A log that is closed at the end of the block."""
    log = SegmentLog()
    try:
        yield log
    finally:
        log.close()


class BoundedFile:
    """A file that keeps its first and its last bytes, and says how many are missing between."""

    def __init__(
        self, path: Path, head_bytes: int = HEAD_BYTES, tail_bytes: int = TAIL_BYTES
    ) -> None:
        self._path, self._head_bytes, self._tail_bytes = path, head_bytes, tail_bytes
        self._num_left_out = 0
        self._tail_start = head_bytes
        self._size = path.stat().st_size if path.exists() else 0

    def append(self, content: bytes) -> None:
        """Add bytes. Raises OSError."""
        with self._path.open("ab") as file:
            file.write(content)
        self._size += len(content)
        if self._size - self._tail_start > 2 * self._tail_bytes:
            self._shorten()

    def _shorten(self) -> None:
        """Write it anew with half of its tail, beside it; then put it in its place."""
        whole = self._path.read_bytes()
        tail = whole[-self._tail_bytes :]
        tail = tail[tail.find(b"\n") + 1 :]  # whole lines
        self._num_left_out += len(whole) - self._tail_start - len(tail)
        kept = whole[: self._head_bytes] + LEFT_OUT % self._num_left_out
        beside = self._path.with_name(f"{self._path.name}.new")
        beside.write_bytes(kept + tail)
        beside.replace(self._path)
        self._tail_start, self._size = len(kept), len(kept) + len(tail)


class Waiting:
    """Bytes on their way to the file. Where a store hangs, those that come too much are left out.

    They are counted, and not in how many pieces they come: a stack comes word by word.
    """

    def __init__(self) -> None:
        self._content, self._is_over = bytearray(), False
        self._changed = threading.Condition()

    def put(self, content: bytes) -> None:
        """Add what the file is to have, if there is room."""
        with self._changed:
            if len(self._content) + len(content) <= MAX_WAITING_BYTES:
                self._content += content
                self._changed.notify()

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    def take(self) -> bytes:
        """All that waits, once there is something; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._content or self._is_over)
            content, self._content = bytes(self._content), bytearray()
        return content


def keep(path: Path, reading: int) -> None:
    """Pass on what comes from ``reading``, and keep it, until standard input ends.

    What comes by standard input is kept only.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    waiting = Waiting()
    writer = threading.Thread(target=_write, args=(path, waiting), daemon=True)
    writer.start()
    sources = {reading, STDIN}
    while sources:
        ready, _, _ = select.select(sources, [], [], None if STDIN in sources else 0.0)
        if not ready:
            break
        for source in ready:
            content = os.read(source, CHUNK_BYTES)
            if not content:
                sources.discard(source)
                continue
            if source != STDIN:
                _pass_on(content)
            waiting.put(content)
    waiting.end()
    writer.join(CLOSE_S)


def _pass_on(content: bytes) -> None:
    """To where standard error went before; its reader may be gone."""
    with contextlib.suppress(OSError):
        while content:
            content = content[os.write(STDERR, content) :]


def _write(path: Path, waiting: Waiting) -> None:
    file = BoundedFile(path)
    has_failed = False
    while content := waiting.take():
        try:
            file.append(content)
        except OSError as error:
            if not has_failed:
                _pass_on(f"WARNING: the log {path} is incomplete: {error}\n".encode())
            has_failed = True


if __name__ == "__main__":
    keep(Path(sys.argv[1]), int(sys.argv[2]))
