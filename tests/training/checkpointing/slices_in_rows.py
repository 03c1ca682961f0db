"""Checkpoints of slices, written as by several processes: by one, which cuts whole tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from holdfast.training.checkpointing.manager import (
    CheckpointContents,
    CheckpointManager,
    of_weights,
)
from holdfast.training.checkpointing.manifest import FileEntry
from holdfast.training.checkpointing.policy import Kind, Retention
from holdfast.training.checkpointing.slices import Part, Region
from holdfast.training.checkpointing.snapshot import FileImage, SnapshotBuffers
from holdfast.training.checkpointing.storage import write_files
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from tests.training.checkpointing.checkpoints import IDENTITY, KEEP_ALL

SPREAD = ("model", "optimizer", "ema")


@dataclass
class Cut:
    """What one of several processes keeps: rows of each tensor, or columns of a wide one."""

    rank: int
    size: int

    def part(self, stem: str, tensors: Mapping[str, Tensor]) -> Part | None:
        if stem not in SPREAD:
            return Part(stem, tensors) if self.rank == 0 else None
        regions = {name: self._region(tensor.shape) for name, tensor in tensors.items()}
        whole = {name: Region.whole(tensor.shape) for name, tensor in tensors.items()}
        own = {
            name: regions[name].of(tensor, whole[name])
            for name, tensor in tensors.items()
            if self.rank == 0 or (tensor.dim() and 0 not in regions[name].shape)
        }
        return Part(
            f"{stem}-{self.rank + 1:05d}-of-{self.size:05d}",
            own,
            {name: regions[name].offsets for name in own},
            {name: tuple(tensors[name].shape) for name in own},
        )

    def region(self, stem: str, name: str, shape: tuple[int, ...]) -> Region:
        return self._region(shape)

    def put(self, stem: str, name: str, shape: tuple[int, ...], own: Tensor) -> Tensor:
        return own

    def _region(self, shape: Sequence[int]) -> Region:
        if not shape:
            return Region.whole(shape)
        dim = int(len(shape) > 1 and shape[1] > shape[0])
        length = -(-shape[dim] // self.size)
        begin = min(self.rank * length, shape[dim])
        offsets, cut = [0] * len(shape), list(shape)
        offsets[dim], cut[dim] = begin, min(length, shape[dim] - begin)
        return Region(tuple(offsets), tuple(cut))


@dataclass
class Others:
    """All processes but the first; ``contents`` are what they are asked to copy."""

    size: int
    contents: CheckpointContents | None = None
    _images: list[dict[str, FileImage]] = field(default_factory=list)
    _folder: Path = Path()

    @property
    def slicing(self) -> Cut:
        return Cut(0, self.size)

    def ask(self, kind: Kind | None) -> None:
        if kind is not None:
            assert self.contents is not None
            tensors = self.contents.tensors
            wanted = tensors if kind == "full" else of_weights(tensors)
            cuts = (Cut(rank, self.size) for rank in range(1, self.size))
            self._images = [SnapshotBuffers(cut).take(wanted) for cut in cuts]

    def begin(self, folder: Path) -> None:
        self._folder = folder

    def entries(self) -> dict[str, FileEntry]:
        entries: dict[str, FileEntry] = {}
        for images in self._images:
            entries |= write_files(self._folder, images)
        return entries

    def end(self) -> None:
        pass


@contextmanager
def managing_slices(
    run: RunDirectory, size: int, policies: Sequence[Retention] = KEEP_ALL
) -> Iterator[tuple[CheckpointManager, Others]]:
    others = Others(size)
    with Lease.acquire(run, 30.0) as lease:
        yield CheckpointManager(run, lease, IDENTITY, policies, others=others), others


def save_slices(run: RunDirectory, size: int, *contents: CheckpointContents) -> None:
    with managing_slices(run, size) as (manager, others):
        for one in contents:
            others.contents = one
            manager.save(one, wait=True)


def odd_tensors(step: int) -> dict[str, dict[str, Tensor]]:
    """Sizes that cannot be cut evenly, several types, tied names, numbers, nothing at all."""
    weight = torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5) * step
    tied = torch.arange(3 * 11, dtype=torch.bfloat16).reshape(3, 11) + step
    return {
        "model": {
            "a.weight": weight,
            "a.bias": weight[:, 0].clone(),
            "tied": tied,
            "again": tied,
            "count": torch.tensor(step),
            "two": torch.arange(2, dtype=torch.int64) + step,
            "empty": torch.zeros(0, 4),
            "cube": torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(step)),
        },
        "optimizer": {"a.weight/exp_avg": -weight, "a.weight/step": torch.tensor(float(step))},
        "ema": {"decay-0.9/a.weight": weight / 2, "decay-0.9/tied": tied.float()},
        "state": {"torch.cpu": (torch.arange(5056) % (step + 2)).to(torch.uint8)},
    }
