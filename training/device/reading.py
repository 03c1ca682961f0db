"""Files read into a device's memory, past fresh memory of this machine.

The system gives fresh memory page by page, which takes longer than to copy. So a file goes through
a few buffers, which are pinned. What went to the device comes back and is digested: a digest says
what lies there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle

import torch
from torch import Tensor

from holdfast.training.device.copy_stream import CopyStream, copy_stream

CHUNK_BYTES = 8 * 2**20
NUM_BUFFERS = 4
ROOM = 2
"""Of what is read, the device must have so many times free: what is put back is copied once."""


class DeviceReader:
    """Reads one file after the other into the memory of one device; for one thread."""

    def __init__(
        self,
        streams: Sequence[CopyStream],
        free_bytes: Callable[[], int],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Each stream has its buffer; ``free_bytes`` says what the device has free."""
        self._streams, self._free_bytes, self._chunk_bytes = streams, free_bytes, chunk_bytes
        self._buffers: list[_Buffer] = []

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes fit twice."""
        return self._free_bytes() >= ROOM * num_bytes

    def read(
        self, file: io.FileIO, num_bytes: int, digest: Callable[[memoryview], object]
    ) -> tuple[Tensor, int]:
        """The content, uint8 on the device, and how many bytes of it the file had.

        ``digest`` is given the bytes as they came back, in their order, in another thread.

        Raises OSError, or RuntimeError of torch where the device or pinned memory is short.
        """
        content = torch.empty(num_bytes, dtype=torch.uint8, device=self._streams[0].device)
        if not self._buffers:
            self._buffers = [_Buffer(stream, self._chunk_bytes) for stream in self._streams]
        end = 0
        with ThreadPoolExecutor(1, "holdfast-digest") as thread:  # one: parts keep their order
            for buffer in cycle(self._buffers):
                buffer.wait()
                part = content[end : end + self._chunk_bytes]
                num_read = file.readinto(buffer.memory[: part.numel()])
                if not num_read:
                    break
                buffer.send(part[:num_read])
                buffer.digested = thread.submit(buffer.digest, num_read, digest)
                end += num_read
        for buffer in self._buffers:
            buffer.wait()
        return content, end


class _Buffer:
    """Memory that bytes leave from and come back to."""

    def __init__(self, stream: CopyStream, num_bytes: int) -> None:
        self._stream = stream
        is_pinned = stream.device.type == "cuda"
        self._there = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self._back = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self.memory = self._there.numpy().data
        self.digested: Future[None] | None = None

    def send(self, part: Tensor) -> None:
        """Copy what lies in ``memory`` to the device, and back."""
        there, back = self._there[: part.numel()], self._back[: part.numel()]
        self._stream.copy([(part, there), (back, part)])

    def digest(self, num_bytes: int, digest: Callable[[memoryview], object]) -> None:
        """Digest what came back; in any thread."""
        self._stream.wait()
        digest(self._back.numpy().data[:num_bytes])

    def wait(self) -> None:
        """Return when what was sent last is digested, and raise what was raised there."""
        digested, self.digested = self.digested, None
        if digested is not None:
            digested.result()


def device_reader(device: torch.device) -> DeviceReader | None:
    """What reads into the memory of a device; None where that is this machine's own."""
    streams = [stream for _ in range(NUM_BUFFERS) if (stream := copy_stream(device)) is not None]
    if not streams:
        return None
    return DeviceReader(streams, lambda: torch.cuda.mem_get_info(device)[0])
