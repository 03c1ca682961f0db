"""The losses of a segment on their way to its file, without waiting for the device at each step."""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable
from contextvars import copy_context

import torch
from torch import Tensor

from holdfast.training.exactness.strictness import warn_of_inexactness
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.runs.losses import (
    Difference,
    KnownLosses,
    bits_of,
    comparable_files,
    loss_path,
)

logger = logging.getLogger(__name__)

MAX_WRITE_EVERY_S = 0.5
BLOCK_STEPS = 1024


class LossRecord:
    """Keeps the loss of each step, and compares those of steps that were done before.

    They are fetched from the device in blocks and written at least once a second, while steps take
    less than that. A file that cannot be written is told once, and training goes on.
    """

    def __init__(
        self,
        run: RunDirectory,
        segment: int,
        start_step: int,
        write_every_s: float = MAX_WRITE_EVERY_S,
    ) -> None:
        """``start_step`` steps are done; nothing is written before the first loss."""
        self._path = loss_path(run, segment, start_step + 1)
        self._segment = segment
        self._next_step = start_step + 1
        self._known = KnownLosses(comparable_files(run, segment), start_step)
        self._pending: list[Tensor] = []
        self._blocks: list[Tensor] = []
        self._writing = threading.Lock()
        self._write_every_s = min(write_every_s, MAX_WRITE_EVERY_S)
        self._written_s = time.monotonic()
        self._file: int | None = None
        self._is_failing = False
        self._num_different = 0

    def add(self, loss: Tensor) -> None:
        """Take the loss of the next step, a scalar on any device. Does not wait for it.

        Raises InexactError where a step that was done before had another loss, and warnings about
        exactness are errors.
        """
        self._pending.append(loss)
        now_s = time.monotonic()
        if now_s - self._written_s >= self._write_every_s or len(self._pending) >= BLOCK_STEPS:
            self.flush()
            self._written_s = now_s

    def flush(self) -> None:
        """Write what was taken. Waits for the device. Raises what ``add`` raises."""
        self._set_aside()
        self._write_blocks()

    def _set_aside(self) -> None:
        if self._pending:
            self._blocks.append(torch.stack(self._pending).double())
            self._pending = []

    def _write_blocks(self) -> None:
        with self._writing:
            while self._blocks:
                self._write_losses(self._blocks.pop(0).tolist())

    def _write_losses(self, losses: list[float]) -> None:
        first = self._next_step
        self._next_step += len(losses)
        self._write(struct.pack(f"<{len(losses)}d", *losses))
        for step, loss in enumerate(losses, first) if len(self._known) else ():
            if self._known.knows(step):
                found = self._known.compare(step, bits_of(loss), self._segment)
                if found is not None:
                    self._tell(found)

    def sync_later(self) -> Callable[[], None]:
        """What has all of them so far on disk, before a checkpoint is made of their steps.

        It may be called in any thread, and raises as ``add``. This itself waits for nothing.
        """
        self._set_aside()
        context = copy_context()  # it tells whether warnings are errors

        def sync() -> None:
            context.run(self._write_blocks)
            with self._writing:
                if self._file is not None:
                    os.fsync(self._file)

        return sync

    def close(self) -> None:
        """Write the rest. No other call may follow."""
        try:
            self.flush()
        finally:
            with self._writing:
                if self._file is not None:
                    os.close(self._file)
                    self._file = None

    def _write(self, content: bytes) -> None:
        if self._is_failing:
            return  # what comes after a gap would be taken for other steps
        try:
            if self._file is None:
                self._path.parent.mkdir(exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o666)
            if os.write(self._file, content) != len(content):
                raise OSError(28, "No space left on device")
        except OSError as error:
            self._is_failing = True
            logger.warning("%s cannot be written, training goes on: %s", self._path, error.strerror)

    def _tell(self, found: Difference) -> None:
        self._num_different += 1
        if self._num_different == 1:
            warn_of_inexactness(
                f"{found}: this training is not exact. Find out why with holdfast check, or look "
                f"for what the step reads that is no part of a checkpoint"
            )
