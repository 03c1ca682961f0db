"""Slices: the parts of tensors that several processes keep, each in a file of its own.

A checkpoint of slices has a file for each process and stem, ``model-00001-of-00003.safetensors``.
Each says where its slices begin in the whole tensors, and the manifest what shapes these have. So
any process takes what it needs from any number of files, and is sure that each element of each
tensor came exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.manifest import (
    TENSOR_SUFFIX,
    Manifest,
    joint_digest,
    read_manifest,
)
from holdfast.training.checkpointing.tensor_file import (
    DTYPE_NAMES,
    Layout,
    MappedFile,
    placed,
)
from holdfast.training.errors import CheckpointCorruptError


class Region(NamedTuple):
    """A box of a tensor: where it begins, and its shape."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def stored(cls, layout: Layout, name: str) -> Region:
        """What a file holds of a tensor: a slice, or all of it."""
        shape = layout.slots[name].shape
        return cls(layout.offsets.get(name, (0,) * len(shape)), shape)

    def overlap(self, other: Region) -> Region | None:
        """What two boxes have in common; None where that is nothing."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self._ends(), other._ends())
        shape = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        return Region(begins, shape) if all(size > 0 for size in shape) else None

    def of(self, tensor: Tensor, origin: Region) -> Tensor:
        """This box of a tensor that is the box ``origin`` of the whole."""
        for dim, (begin, size) in enumerate(zip(self.offsets, self.shape, strict=True)):
            tensor = tensor.narrow(dim, begin - origin.offsets[dim], size)
        return tensor

    def _ends(self) -> Iterator[int]:
        return (begin + size for begin, size in zip(self.offsets, self.shape, strict=True))


@dataclass(frozen=True)
class Part:
    """What one process writes of the tensors of a stem.

    Attributes:
        file: without its suffix.
        tensors: by name: whole tensors, or slices that this process has.
        offsets: where each slice begins; empty where all tensors are whole.
        shapes: of the whole tensors, in the same case.
    """

    file: str
    tensors: Mapping[str, Tensor]
    offsets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Slicing(Protocol):
    """Which slices of tensors this process keeps."""

    def part(self, stem: str, tensors: Mapping[str, Tensor]) -> Part | None:
        """What this process writes of live tensors; None for nothing."""
        ...

    def region(self, stem: str, name: str, shape: tuple[int, ...]) -> Region:
        """What it keeps of a tensor of this shape."""
        ...

    def put(self, stem: str, name: str, shape: tuple[int, ...], own: Tensor) -> Tensor:
        """The tensor of which ``own`` is what this process keeps."""
        ...


class Whole:
    """A process that keeps all of each tensor."""

    def part(self, stem: str, tensors: Mapping[str, Tensor]) -> Part | None:
        """As ``Slicing.part``."""
        return Part(stem, tensors)

    def region(self, stem: str, name: str, shape: tuple[int, ...]) -> Region:  # noqa: ARG002
        """As ``Slicing.region``."""
        return Region.whole(shape)

    def put(self, stem: str, name: str, shape: tuple[int, ...], own: Tensor) -> Tensor:  # noqa: ARG002
        """As ``Slicing.put``."""
        return own


WHOLE: Slicing = Whole()


class Assembly:
    """Tensors that are put together from files of slices, which come in any order.

    With ``slicing`` those slices are kept that it asks for; without, nothing is. With ``only_own``
    files may be left out of which nothing is kept.
    """

    def __init__(
        self,
        shapes: Mapping[str, Mapping[str, Any]],
        slicing: Slicing | None,
        *,
        only_own: bool = False,
    ) -> None:
        self._shapes = shapes
        self._slicing = slicing
        self._kept_of = slicing if slicing is not None and only_own else WHOLE
        self._found: dict[tuple[str, str], list[tuple[Region, str]]] = {}
        self._own: dict[tuple[str, str], tuple[Region, Tensor]] = {}
        self._aliases: dict[str, dict[str, str]] = {stem: {} for stem in shapes}

    def take(self, stem: str, layout: Layout, data: memoryview, file: str) -> None:
        """The next file. Raises CheckpointCorruptError for a slice that is not of these tensors."""
        for name, slot in layout.slots.items():
            shape = self._shapes.get(stem, {}).get(name)
            region = Region.stored(layout, name)
            inside = None if shape is None else Region.whole(shape)
            is_empty = math.prod(slot.shape) == 0
            if inside is None or not (is_empty or inside.overlap(region) == region):
                raise CheckpointCorruptError(
                    f"{file} holds {list(slot.shape)} of {stem}.{name} from {list(region.offsets)} "
                    f"on, and the manifest says that this tensor "
                    f"{'is not there' if shape is None else f'has the shape {list(shape)}'}"
                )
            self._found.setdefault((stem, name), []).append((region, file))
            if self._slicing is not None:
                self._keep(stem, name, region, slot.view(data), file)
        self._aliases.setdefault(stem, {}).update(layout.aliases)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What was kept, by stem and name, once ``require_whole`` was satisfied."""
        kept: dict[str, dict[str, Tensor]] = {stem: {} for stem in self._shapes}
        for (stem, name), (_, own) in self._own.items():
            assert self._slicing is not None
            kept[stem][name] = self._slicing.put(stem, name, self._shapes[stem][name], own)
        for stem, aliases in self._aliases.items():
            kept[stem] |= {name: kept[stem][stored] for name, stored in aliases.items()}
        return kept

    def require_whole(self, folder: Path) -> None:
        """Raise CheckpointCorruptError unless each element came exactly once."""
        for stem, shapes in self._shapes.items():
            for name, shape in shapes.items():
                wanted = self._kept_of.region(stem, name, tuple(shape))
                problem = _uncovered(wanted, self._found.get((stem, name), []))
                if problem:
                    raise CheckpointCorruptError(f"{folder}: of {stem}.{name} {problem}")

    def _keep(self, stem: str, name: str, region: Region, slice_: Tensor, file: str) -> None:
        assert self._slicing is not None
        if (stem, name) not in self._own:
            wanted = self._slicing.region(stem, name, tuple(self._shapes[stem][name]))
            self._own[stem, name] = wanted, self._empty(stem, name, wanted, slice_.dtype)
        wanted, own = self._own[stem, name]
        if own.dtype != slice_.dtype:
            raise CheckpointCorruptError(
                f"{file} holds {stem}.{name} as {DTYPE_NAMES[slice_.dtype]}, another file as "
                f"{DTYPE_NAMES[own.dtype]}"
            )
        common = wanted.overlap(region)
        if common is not None:
            common.of(own, wanted).copy_(common.of(slice_, region))

    def _empty(self, stem: str, name: str, wanted: Region, dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(wanted.shape, dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            raise CheckpointCorruptError(
                f"{stem}.{name} has the shape {list(self._shapes[stem][name])} in the manifest, "
                f"for which this machine has no memory"
            ) from error


def _uncovered(wanted: Region, found: Sequence[tuple[Region, str]]) -> str | None:
    """What is wrong with a tensor's slices; None where each wanted element is in one of them."""
    if not found:
        return "there is no slice in any file"
    ordered = sorted(found)
    for number, (region, file) in enumerate(ordered):
        for other, other_file in ordered[number + 1 :]:
            if region.shape and other.offsets[0] >= region.offsets[0] + region.shape[0]:
                break
            if region.overlap(other) is not None:
                return f"the same elements are in {file} and in {other_file}"
    common = (wanted.overlap(region) for region, _ in found)
    num, num_wanted = sum(math.prod(part.shape) for part in common if part), math.prod(wanted.shape)
    if num != num_wanted:
        return f"{num} of {num_wanted} elements are in {len(found)} files: slices are missing"
    return None


def files_of_own(folder: Path, manifest: Manifest, slicing: Slicing) -> Manifest:
    """The manifest of those files alone of which this process keeps something.

    The first file of slices of each stem has every name, and what all processes have whole.

    Raises CheckpointCorruptError for one that is no safetensors file, or StorageError.
    """
    left_out = {
        name
        for stem, shapes in manifest.shapes.items()
        for name in manifest.files_of(f"{stem}{TENSOR_SUFFIX}")[1:]
        if not _holds_any(MappedFile(folder / name).layout, stem, shapes, slicing)
    }
    files = {name: entry for name, entry in manifest.files.items() if name not in left_out}
    return manifest.model_copy(update={"files": files})


def _holds_any(layout: Layout, stem: str, shapes: Mapping[str, Any], slicing: Slicing) -> bool:
    return any(
        name not in shapes  # which is told by whoever takes the file
        or slicing.region(stem, name, tuple(shapes[name])).overlap(Region.stored(layout, name))
        for name in layout.slots
    )


class MappedSlices:
    """The files of one stem, as if they were one; in memory is one tensor at a time.

    Raises CheckpointCorruptError where they do not hold each tensor once, or StorageError.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        stem, folder = path.stem, path.parent
        self._files = [MappedFile(folder / name) for name in manifest.files_of(path.name)]
        shapes = manifest.shapes[stem]
        whole = Assembly({stem: shapes}, None)
        types: dict[str, torch.dtype] = {}
        aliases: dict[str, str] = {}
        for file in self._files:
            whole.take(stem, file.layout, memoryview(b""), str(file.path))
            types |= {name: slot.dtype for name, slot in file.layout.slots.items()}
            aliases |= file.layout.aliases
        whole.require_whole(folder)
        slots = placed({name: (types[name], shape) for name, shape in shapes.items()})
        self.layout = Layout(slots, aliases)
        self._now: tuple[str, Tensor] | None = None

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, put together."""
        if self._now is None or self._now[0] != name:
            self._now = None  # make room before taking more
            self._now = name, self._joined(name)
        return self._now[1]

    def chunk(self, name: str, start: int, num_items: int) -> Tensor:
        """Some items of a tensor, flat."""
        return self.tensor(name).view(-1)[start : start + num_items]

    def release(self, name: str, start: int, num_items: int) -> None:
        """Let go of a chunk: of the tensor, after its last one."""
        if start + num_items >= math.prod(self.layout.slots[name].shape):
            self._now = None

    def _joined(self, name: str) -> Tensor:
        whole = self.layout.slots[name]
        tensor = torch.empty(whole.shape, dtype=whole.dtype)
        for file in self._files:
            slot = file.layout.slots.get(name)
            if slot is not None:
                region = Region.stored(file.layout, name)
                region.of(tensor, Region.whole(whole.shape)).copy_(file.tensor(name))
                file.release(name, 0, math.prod(slot.shape))
        return tensor


def open_part(path: Path) -> MappedFile | MappedSlices:
    """A safetensors file, mapped; or, where its name stands for slices of a checkpoint, those.

    The latter is ``model.safetensors`` in the folder of a checkpoint that has
    ``model-00001-of-00003.safetensors`` and so on in its place.

    Raises CheckpointCorruptError or StorageError.
    """
    manifest = _sliced_manifest(path)
    if manifest is None:
        return MappedFile(path)
    return MappedSlices(path, manifest)


def is_part(path: Path) -> bool:
    """Whether ``open_part`` finds something there."""
    return path.is_file() or _sliced_manifest(path) is not None


def digest_of_part(path: Path, algorithm: str) -> str:
    """The digest of what ``open_part`` opens, as it lies on the disk; see ``Manifest.digest_of``.

    Raises CheckpointCorruptError or StorageError.
    """
    manifest = _sliced_manifest(path)
    names = [path.name] if manifest is None else manifest.files_of(path.name)
    return joint_digest(
        {
            name: read_file(path.parent / name, algorithm, on_bytes=lambda _: None)[1]
            for name in names
        }
    )


def _sliced_manifest(path: Path) -> Manifest | None:
    if path.exists() or not any(path.parent.glob(f"{path.stem}-*-of-*{TENSOR_SUFFIX}")):
        return None
    manifest = read_manifest(path.parent)
    return manifest if path.stem in manifest.shapes else None
