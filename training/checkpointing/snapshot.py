"""Copies of live tensors in buffers that are used again and again.

A buffer has the layout of the file that will be written from it, so a save costs the training loop
one copy of the bytes and nothing else. Buffers for tensors on a GPU are pinned: the copy then runs
at the speed of the bus.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType

import torch
from torch import Tensor

from holdfast.training.checkpointing.digests import Bytes
from holdfast.training.checkpointing.slices import WHOLE, Part, Slicing
from holdfast.training.checkpointing.tensor_file import Layout, plan_layout
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import UnsupportedStateError, kind_of
from holdfast.training.runs.durable_json import json_bytes


@dataclass(frozen=True)
class FileImage:
    """The bytes of one file in memory, in parts that are written with one call each."""

    parts: Sequence[Bytes]

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return sum(len(part) for part in self.parts)


def json_image(value: Json, path: str) -> FileImage:
    """The file of a JSON value.

    Raises UnsupportedStateError that names the path of what JSON would lose or change: tuples,
    sets, keys that are not text, NaN, objects.
    """
    _require_json(value, path)
    return FileImage([json_bytes(value)])


class SnapshotBuffers:
    """One buffer per file, kept from one snapshot to the next.

    Of tensors that lie in slices, ``slicing`` says what this process has to write.

    Attributes:
        copies: the tensors of the last snapshot by file stem and name, within the buffers.
        put_off: those of them that are still to be made, each with what it is made of.
        shapes: of the whole tensors of which there are slices, by file stem and name.
    """

    def __init__(self, slicing: Slicing = WHOLE) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._slicing = slicing
        self.copies: dict[str, dict[str, Tensor]] = {}
        self.put_off: list[tuple[Tensor, Tensor]] = []
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def sizes(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[int, bool]]:
        """What a snapshot of these tensors needs: bytes by file stem, and whether they are pinned.

        Raises as ``take``.
        """
        return {
            stem: (plan_layout(part.tensors, stem).data_bytes, _is_on_gpu(part.tensors))
            for stem, part in self._parts(tensors).items()
        }

    def reserve(self, sizes: Mapping[str, tuple[int, bool]]) -> None:
        """Take the memory of a snapshot before there is one; not beside another call.

        The system gives memory when it is written to, and locks it for a GPU when it is taken:
        for large states either takes longer than the copy.
        """
        for stem, (num_bytes, is_pinned) in sizes.items():
            buffer = self._buffer(stem, num_bytes, is_pinned)
            if not is_pinned:
                buffer.zero_()

    def take(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        late: Mapping[str, Collection[str]] = MappingProxyType({}),
    ) -> dict[str, FileImage]:
        """Copy all tensors. The images are good until the next call.

        Args:
            tensors: file stem -> name -> live tensor.
            late: names, by file stem, of those that the caller will copy (``put_off``). Where there
                are any, copies of other tensors on a GPU may still be on their way after return.

        Raises:
            UnsupportedStateError: a tensor has no place in the format; nothing was copied.
        """
        parts = self._parts(tensors)
        layouts = {
            stem: plan_layout(part.tensors, stem, part.offsets) for stem, part in parts.items()
        }
        images, self.copies, self.shapes, self.put_off = {}, {}, {}, []
        for stem, layout in layouts.items():
            part = parts[stem]
            data = self._buffer(stem, layout.data_bytes, _is_on_gpu(part.tensors))
            self.copies[stem] = _copies(layout, data)
            images[f"{part.file}.safetensors"] = FileImage(_parts(layout, data))
            if part.shapes:
                self.shapes[stem] = {name: part.shapes[name] for name in layout.slots}
            for name, copy in self.copies[stem].items():
                source = part.tensors[name].detach()
                if name in late.get(stem, ()):
                    self.put_off.append((copy, source))
                else:
                    copy.copy_(source, non_blocking=True)
        if not self.put_off:
            _wait_for_copies({stem: part.tensors for stem, part in parts.items()})
        return images

    def copied(self, names: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """Copies of these names, by file stem, as far as they are there: tied ones are once."""
        return {
            f"{stem}.{name}": self.copies[stem][name]
            for stem, inner in names.items()
            for name in inner
            if name in self.copies.get(stem, {})
        }

    def _parts(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Part]:
        found = {stem: self._slicing.part(stem, inner) for stem, inner in tensors.items()}
        return {stem: part for stem, part in found.items() if part is not None}

    def _buffer(self, stem: str, num_bytes: int, is_pinned: bool) -> Tensor:
        known = self._buffers.get(stem)
        if known is None or known.numel() < num_bytes or known.is_pinned() != is_pinned:
            self._buffers.pop(stem, None)  # make room before taking more
            known = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
            self._buffers[stem] = known
        return known[:num_bytes]


def _copies(layout: Layout, data: Tensor) -> dict[str, Tensor]:
    memory = data.numpy().data
    return {name: slot.view(memory) for name, slot in layout.slots.items()}


def _wait_for_copies(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    devices = {tensor.device for inner in tensors.values() for tensor in inner.values()}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _parts(layout: Layout, data: Tensor) -> list[Bytes]:
    memory = data.numpy().data
    parts: list[Bytes] = [layout.header()]
    parts += [memory[slot.start : slot.start + slot.num_bytes] for slot in layout.slots.values()]
    return parts


def _is_on_gpu(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors.values())


def _require_json(value: object, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise UnsupportedStateError(
                    f"{path} has the key {key!r}; JSON has text as keys only: use str(key)"
                )
            _require_json(item, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _require_json(item, f"{path}[{number}]")
    elif type(value) is float and not isfinite(value):
        raise UnsupportedStateError(f"{path} is {value}, which JSON does not have: use a tensor")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise UnsupportedStateError(
            f"{path} is {kind_of(value, is_full=True)}; a checkpoint holds "
            f"tensors and JSON only: save numbers, text, lists, dicts or tensors"
        )
