"""A file that is read into a device's memory lies there as on the disk, and its digest says so.

The streams copy at the last moment, so that a wait that is missing shows.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.device.reading import DeviceReader, device_reader
from holdfast.training.errors import CheckpointCorruptError
from tests.training.far_memory import FarReader, Forgetful, LastMoment

CHUNK = 1000


@pytest.mark.parametrize("num_streams", [1, 2, 3])
@pytest.mark.parametrize(
    "num_bytes", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 7 * CHUNK, 7 * CHUNK + 3]
)
def test_a_file_of_any_size_and_its_digest(
    num_bytes: int, num_streams: int, tmp_path: Path
) -> None:
    content = os.urandom(num_bytes)
    (tmp_path / "file").write_bytes(content)
    reader = DeviceReader([LastMoment() for _ in range(num_streams)], lambda: 0, CHUNK)
    for _ in range(2):  # with the same buffers
        found, digest = read_file(tmp_path / "file", "blake3", num_bytes, device=reader)
        assert found.numpy().tobytes() == content
        assert digest == digest_of([content])


def test_the_digest_is_of_what_lies_there_and_not_of_what_was_sent(tmp_path: Path) -> None:
    content = os.urandom(5 * CHUNK)
    (tmp_path / "file").write_bytes(content)
    streams = [LastMoment(), Forgetful(), LastMoment()]
    _, digest = read_file(tmp_path / "file", "blake3", device=FarReader(streams))
    assert digest != digest_of([content])


@pytest.mark.parametrize("change", [-1, 1, -3 * CHUNK, 3 * CHUNK])
def test_a_file_that_has_another_size_than_it_said(change: int, tmp_path: Path) -> None:
    path, num_bytes = tmp_path / "file", 5 * CHUNK
    path.write_bytes(os.urandom(num_bytes + change))
    with io.FileIO(path) as file:
        found, end = FarReader().read(file, num_bytes, lambda _: None)
    assert (found.numel(), end) == (num_bytes, min(num_bytes, num_bytes + change))
    with pytest.raises(CheckpointCorruptError, match=rf"has {num_bytes + change} bytes, the man"):
        read_file(path, "blake3", num_bytes, device=FarReader())


def test_what_fails_in_the_thread_that_digests_is_raised(tmp_path: Path) -> None:
    def fail(_: memoryview) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    (tmp_path / "file").write_bytes(os.urandom(5 * CHUNK))
    reader = FarReader()
    with io.FileIO(tmp_path / "file") as file, pytest.raises(RuntimeError, match="illegal memory"):
        reader.read(file, 5 * CHUNK, fail)


def test_there_must_be_room_for_the_tensors_that_are_made_of_it() -> None:
    assert FarReader(free_bytes=2000).has_room(1000)
    assert not FarReader(free_bytes=1999).has_room(1000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_bytes", [0, 1, 8 * 2**20, 100 * 2**20 + 3])
def test_a_file_is_read_to_a_gpu(num_bytes: int, tmp_path: Path) -> None:
    content = os.urandom(num_bytes)
    (tmp_path / "file").write_bytes(content)
    reader = device_reader(torch.device("cuda"))
    assert reader is not None
    assert reader.has_room(num_bytes)
    for _ in range(2):
        found, digest = read_file(tmp_path / "file", "blake3", num_bytes, device=reader)
        assert found.is_cuda
        assert found.cpu().numpy().tobytes() == content
        assert digest == digest_of([content])


def test_nothing_reads_into_this_machines_own_memory() -> None:
    assert device_reader(torch.device("cpu")) is None
