"""Weighted averages of weight files, in memory for one chunk of one tensor.

The files are mapped, the output is written as it is computed, and what was read is let go of. Sums
are taken in fp64, in the order of the files' names, so the order in which they are given does not
matter. Where all files agree, their bytes are copied: equal inputs give themselves, to the bit.
Integer and boolean tensors are those of the newest file: a count of batches has no meaningful mean.
Tied tensors stay tied.

A disk that fails under a mapping ends the process with a signal. So verify files before they are
averaged, which reads them and raises an error instead.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from holdfast.training.checkpointing.digests import Bytes
from holdfast.training.checkpointing.slices import MappedSlices, open_part
from holdfast.training.checkpointing.tensor_file import Layout, MappedFile, Slot, plan_layout
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import SelectionError
from holdfast.training.runs.durable_json import storage_error

CHUNK_ITEMS = 2**17  # 1 MiB of fp64: two of them stay in a core's cache
HEAD_BYTES = 64
DIGEST = "sha256"


@dataclass(frozen=True)
class Term:
    """What one file contributes.

    Attributes:
        path: a safetensors file, or what stands for the slices of a checkpoint, see ``open_part``.
        weight: what it counts; the sum is divided by the sum of all weights.
        prefix: what its tensors' names begin with, e.g. ``decay-0.999/`` in a file of averages.
    """

    path: Path
    weight: float = 1.0
    prefix: str = ""


class WeightsWriter:
    """Writes a safetensors file chunk by chunk, and digests it on the way."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path = path
        self._layout = layout
        self._hasher = hashlib.new(DIGEST)

    def write(self, chunks: Iterator[Tensor]) -> str:
        """Write the header and the chunks; the file's digest. After return it is on the disk.

        Raises StorageError, also where the file exists.
        """
        try:
            with self._path.open("xb", buffering=0) as file:
                self._put(file.fileno(), self._layout.header())
                for chunk in chunks:
                    self._put(file.fileno(), chunk.reshape(-1).view(torch.uint8).numpy().data)
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error("write", self._path, error, self._layout.data_bytes) from error
        return f"{DIGEST}:{self._hasher.hexdigest()}"

    def _put(self, descriptor: int, data: Bytes) -> None:
        self._hasher.update(data)
        rest = memoryview(data)
        while rest:  # a disk that becomes full writes less, and then fails
            rest = rest[os.write(descriptor, rest) :]


@dataclass(frozen=True)
class _Source:
    """A term whose file is open; names are those of the model."""

    term: Term
    file: MappedFile | MappedSlices
    slots: Mapping[str, Slot]
    aliases: Mapping[str, str]

    def chunk(self, name: str, start: int, num_items: int) -> Tensor:
        return self.file.chunk(self.term.prefix + name, start, num_items)

    def release(self, name: str, start: int, num_items: int) -> None:
        self.file.release(self.term.prefix + name, start, num_items)


def write_average(target: Path, terms: Sequence[Term], template: Path | None = None) -> str:
    """Write the weighted average of some files as a file of weights, and return its digest.

    Args:
        target: the file to make.
        terms: in any order. The one with the longest path, of those of one length the last by
            name, is the newest, as it is with checkpoints.
        template: a weight file with the names, shapes, types and ties that the result has, e.g. of
            the model whose fp32 averages are given. None takes those of the newest term.

    Raises:
        SelectionError: there is no term, or names, shapes, types or ties differ.
        CheckpointCorruptError: a file is no safetensors file.
        StorageError: a file cannot be read, or the target not be written.
    """
    layout, chunks = _plan(terms, template)
    return WeightsWriter(target, layout).write(chunks)


def averages(terms: Sequence[Term], template: Path | None = None) -> Iterator[Tensor]:
    """The flat chunks of the average, in the order of the file that ``write_average`` makes.

    A chunk is good until the next one is asked for. Raises what ``write_average`` raises.
    """
    return _plan(terms, template)[1]


def _plan(terms: Sequence[Term], template: Path | None) -> tuple[Layout, Iterator[Tensor]]:
    if not terms:
        raise SelectionError("an average needs at least one weight file, found none")
    ordered = sorted(terms, key=lambda term: (len(str(term.path)), str(term.path), term.prefix))
    paths = {term.path for term in ordered} | ({template} if template else set())
    files = {path: open_part(path) for path in paths}
    sources = [_source(term, files[term.path]) for term in ordered]
    model = files[template or ordered[-1].path]
    _require_one_model(sources, model)
    layout = model.layout
    tensors = ((name, slot.dtype) for name, slot in layout.slots.items())
    return layout, (chunk for tensor in tensors for chunk in _averaged(*tensor, sources))


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], extra_state: Mapping[str, Json] | None = None
) -> str:
    """Write tensors as a file of weights, and return its digest. The same tensors, the same bytes.

    ``extra_state`` is what modules keep beside tensors, by its name in the state dict.

    Raises StorageError.
    """
    layout = replace(plan_layout(tensors, path.name), extra_state=extra_state or {})
    chunks = (tensors[name].detach().cpu().contiguous() for name in layout.slots)
    return WeightsWriter(path, layout).write(chunks)


def _averaged(name: str, dtype: torch.dtype, sources: Sequence[_Source]) -> Iterator[Tensor]:
    """The average of one tensor, chunk by chunk."""
    weights = [source.term.weight for source in sources]
    num_items = math.prod(sources[-1].slots[name].shape)
    for start, end in pairwise([*range(0, num_items, CHUNK_ITEMS), num_items]):
        yield _mean([s.chunk(name, start, end - start) for s in sources], weights, dtype)
        for source in sources:
            source.release(name, start, end - start)


def _mean(parts: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    newest = parts[-1]
    is_counted = not (newest.is_floating_point() or newest.is_complex())
    # Adding and dividing could overflow or round; equal inputs need neither.
    if is_counted or all(_has_same_bytes(part, newest) for part in parts[:-1]):
        return newest.to(dtype)
    wide = torch.complex128 if newest.is_complex() else torch.float64
    total = parts[0].to(wide).mul_(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        # Added as it is, it is converted on the way; types of one byte torch does not promote.
        total.add_(part if part.itemsize > 1 else part.to(wide), alpha=weight)
    return total.div_(math.fsum(weights)).to(dtype)


def _has_same_bytes(one: Tensor, other: Tensor) -> bool:
    one, other = one.view(torch.uint8), other.view(torch.uint8)
    # Different tensors mostly differ at once.
    return torch.equal(one[:HEAD_BYTES], other[:HEAD_BYTES]) and torch.equal(one, other)


def _source(term: Term, file: MappedFile | MappedSlices) -> _Source:
    start = len(term.prefix)
    slots = {
        name[start:]: slot
        for name, slot in file.layout.slots.items()
        if name.startswith(term.prefix)
    }
    aliases = {
        name[start:]: stored[start:]
        for name, stored in file.layout.aliases.items()
        if name.startswith(term.prefix)
    }
    return _Source(term, file, slots, aliases)


def _require_one_model(sources: Sequence[_Source], model: MappedFile | MappedSlices) -> None:
    newest = sources[-1]
    for source in sources:
        found, expected = _kinds(source.slots), _kinds(newest.slots)
        _require_equal("types and shapes", source, found, newest.term.path, expected)
        found, expected = _shapes(source.slots), _shapes(model.layout.slots)
        _require_equal("tensors", source, found, model.path, expected)
        _require_equal("ties", source, source.aliases, model.path, model.layout.aliases)


def _kinds(slots: Mapping[str, Slot]) -> dict[str, str]:
    return {name: f"{slot.dtype} {list(slot.shape)}" for name, slot in slots.items()}


def _shapes(slots: Mapping[str, Slot]) -> dict[str, str]:
    return {name: str(list(slot.shape)) for name, slot in slots.items()}


def _require_equal(
    what: str, source: _Source, found: Mapping[str, str], path: Path, expected: Mapping[str, str]
) -> None:
    for name in sorted(found.keys() | expected.keys()):
        there, here = expected.get(name, "absent"), found.get(name, "absent")
        if there != here:
            raise SelectionError(
                f"cannot average {name}: {path} has {there}, {source.term.path} has {here}; they "
                f"differ in their {what}, and only weights of one model can be averaged"
            )
