"""Files of checkpoints on their way between machines that have no folder in common.

That is so where the store is a bucket: each machine has a scratch disk of its own, and rank 0's may
have a checkpoint that is not up yet. What a run begins with goes from there to the others, whose
first ranks write it for all that are there; slices go to rank 0's machine, which brings them up.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.manifest import MANIFEST_NAME, FileEntry, verify
from holdfast.training.distributed.world import World
from holdfast.training.errors import HoldfastError, StorageError
from holdfast.training.runs.durable_json import storage_error

PART_BYTES = 32 * 2**20


def carry(world: World, folder: Path | None, *, is_here: bool) -> int:
    """Collective. Have the checkpoint in the folder on each machine.

    Args:
        world: all ranks.
        folder: of the checkpoint, as it is named here; None where there is none.
        is_here: whether this rank sees it, the same as rank 0.

    Returns the number of bytes that had to be carried. Raises StorageError or
    CheckpointCorruptError where it cannot be written here.
    """
    places = world.gathered([world.first_here, is_here])
    lacking = sorted({first for first, has in places if not has})
    if folder is None or not lacking:
        return 0
    files: dict[str, int] = world.from_first(_sizes(folder) if world.rank == 0 else None)
    if world.rank == 0:
        for rank in lacking:
            for name in files:
                for part in _parts(folder / name):
                    world.send(part, rank)
                    world.beat()
    elif world.rank in lacking:
        _receive(world, folder, files)
    world.gathered(None)
    return sum(files.values()) * len(lacking)


class Carrier:
    """Brings the slices of ranks of other machines to rank 0, beside the training.

    Attributes:
        ranks: whose slices are to be brought.
    """

    def __init__(self, world: World, ranks: Collection[int]) -> None:
        """Collective."""
        self.ranks = ranks
        self._world = world.for_carrying()

    def send(self, folder: Path, names: Iterable[str]) -> None:
        """Let rank 0 have files, which must ``receive`` them. Raises RankLostError, OSError."""
        for name in names:
            for part in _parts(folder / name):
                self._world.send(part, 0)

    def receive(self, rank: int, folder: Path, files: Mapping[str, FileEntry]) -> None:
        """Write the files of a rank; they are durable and verified after return.

        Raises RankLostError, OSError, and StorageError where they are not what it has written.
        """
        for name, entry in files.items():
            path = folder / name
            with path.open("xb") as file:
                _write(file, self._world, rank, entry.size_bytes)
                file.flush()
                os.fsync(file.fileno())
            algorithm = entry.digest.partition(":")[0]
            _, digest = read_file(path, algorithm, entry.size_bytes, on_bytes=lambda _: None)
            if digest != entry.digest:
                raise StorageError(
                    f"{path} came with the digest {digest}, rank {rank} has written {entry.digest}"
                )


def _sizes(folder: Path) -> dict[str, int]:
    """What is carried, the manifest last."""
    paths = sorted(folder.iterdir(), key=lambda path: (path.name == MANIFEST_NAME, path.name))
    return {path.name: path.stat().st_size for path in paths}


def _parts(path: Path) -> Iterator[Tensor]:
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            yield torch.frombuffer(bytearray(part), dtype=torch.uint8)


def _receive(world: World, folder: Path, files: dict[str, int]) -> None:
    """Write what is sent, in the place of all that was carried here before."""
    making = folder.with_name(f".{folder.name}.carried")
    try:
        shutil.rmtree(folder.parent, ignore_errors=True)  # of a guest's scratch disk
        making.mkdir(parents=True)
        for name, size_bytes in files.items():
            with (making / Path(name).name).open("xb") as file:
                _write(file, world, 0, size_bytes)
        making.rename(folder)
    except OSError as error:
        if isinstance(error, HoldfastError):
            raise
        raise storage_error("write", folder, error, sum(files.values())) from error
    verify(folder)


def _write(file: IO[bytes], world: World, rank: int, size_bytes: int) -> None:
    """Write what a rank sends."""
    for start in range(0, size_bytes, PART_BYTES):
        part = world.receive(min(PART_BYTES, size_bytes - start), rank)
        file.write(part.numpy().data)
        world.beat()
