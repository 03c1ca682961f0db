"""The safetensors format: eight bytes with the header's length, a JSON header, then the tensors.

https://github.com/huggingface/safetensors#format. Files load with ``safetensors.torch.load_file``.
They are deterministic. The format allows no gaps, but tensors should lie as torch's own do, at
multiples of 64 bytes. So the header is padded to that, tensors of a multiple of 64 bytes come
first, then those with the largest items; within that by name. A tensor that has several names
(tied weights) is stored once, under the first of them; the header's metadata has a key
``aliases``, with a JSON object from name to stored name. A champion's file also has
``extra_state`` there, a JSON object of what its modules keep that is no tensor, where they do. A
file of slices says there where each begins in its whole tensor.

The official writer is not used: it takes all tensors as bytes at once, and we write a snapshot
that already has the layout of the file.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.training.configuration.schema import Json
from holdfast.training.errors import CheckpointCorruptError, UnsupportedStateError, kind_of
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.stored_json import parse_json

LENGTH_BYTES = 8
ALIGNMENT_BYTES = 64
MAX_HEADER_BYTES = 100_000_000  # what the official reader accepts
METADATA = "__metadata__"
ALIASES = "aliases"
EXTRA_STATE = "extra_state"
SLICES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""As torch.distributed.checkpoint's readers of safetensors want it."""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the data that follow the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, data: memoryview | Tensor) -> Tensor:
        """The tensor within ``data``, all bytes after the header; shares its memory.

        In memory its storage begins with it: torch's ``Generator.set_state`` reads a storage from
        its start, whatever the tensor's offset, and ends the process.
        """
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        if isinstance(data, Tensor):
            within = _aligned(data[self.start : self.start + self.num_bytes])
            return within.view(self.dtype).reshape(self.shape)
        count = self.num_bytes // self.dtype.itemsize
        flat = torch.frombuffer(data, dtype=self.dtype, count=count, offset=self.start)
        return flat.reshape(self.shape)


@dataclass(frozen=True)
class Layout:
    """What a file holds, and where.

    Attributes:
        slots: the stored tensors by name, in the order of the file.
        aliases: further names of stored tensors.
        extra_state: JSON by name, of what modules keep beside tensors.
        offsets: of slices, where each begins in the whole tensor; none in a file of whole tensors.
    """

    slots: dict[str, Slot]
    aliases: dict[str, str]
    extra_state: Mapping[str, Json] = field(default_factory=dict)
    offsets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes after the header."""
        return sum(slot.num_bytes for slot in self.slots.values())

    def header(self) -> bytes:
        """The file's bytes before the first tensor; a multiple of 64."""
        entries: dict[str, Any] = {}
        slices = {name: {OFFSETS: list(offsets)} for name, offsets in self.offsets.items()}
        metadata = {ALIASES: self.aliases, EXTRA_STATE: self.extra_state, SLICES: slices}
        if any(metadata.values()):
            entries[METADATA] = {
                key: json.dumps(value, sort_keys=True) for key, value in metadata.items() if value
            }
        for name, slot in self.slots.items():
            entries[name] = {
                "dtype": DTYPE_NAMES[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": [slot.start, slot.start + slot.num_bytes],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT_BYTES)
        return len(text).to_bytes(LENGTH_BYTES, "little") + text


class MappedFile:
    """A safetensors file, of which only the pages that are looked at are in memory.

    Raises CheckpointCorruptError where it is none, or StorageError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb", buffering=0) as file:
                # A private mapping: torch warns of memory that cannot be written.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise CheckpointCorruptError(f"{path} is empty") from error
        except FileNotFoundError as error:
            raise CheckpointCorruptError(f"{path} is missing") from error
        except OSError as error:
            raise storage_error("read", path, error) from error
        self.layout, self._data = parse_layout(memoryview(self._map), str(path))
        self._first = len(self._map) - len(self._data)

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, within the mapping."""
        return self.layout.slots[name].view(self._data)

    def chunk(self, name: str, start: int, num_items: int) -> Tensor:
        """Some items of a tensor, flat."""
        slot = self.layout.slots[name]
        begin = slot.start + start * slot.dtype.itemsize
        return Slot(slot.dtype, (num_items,), begin).view(self._data)

    def release(self, name: str, start: int, num_items: int) -> None:
        """Let go of the pages of a chunk; they are read again if they are looked at again."""
        slot = self.layout.slots[name]
        begin = self._first + slot.start + start * slot.dtype.itemsize
        aligned = begin - begin % mmap.PAGESIZE
        num_bytes = begin - aligned + num_items * slot.dtype.itemsize
        self._map.madvise(mmap.MADV_DONTNEED, aligned, num_bytes)


def plan_layout(
    tensors: Mapping[str, Tensor],
    path: str,
    offsets: Mapping[str, tuple[int, ...]] | None = None,
) -> Layout:
    """The layout of a file for these tensors.

    Args:
        tensors: by name; not looked at beyond type, shape and place in memory.
        path: what leads to them, for messages.
        offsets: where slices begin in their whole tensors.

    Raises:
        UnsupportedStateError: something is not a tensor that the format has; names its path.
    """
    for name, tensor in tensors.items():
        _require_supported(tensor, name, path)
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors):
        first = first_names.setdefault(_identity(tensors[name], name), name)
        if first == name:
            stored[name] = tensors[name]
        else:
            aliases[name] = first
    slots = placed({n: (tensor.dtype, tuple(tensor.shape)) for n, tensor in stored.items()})
    return Layout(slots, aliases, offsets={n: offsets[n] for n in slots} if offsets else {})


def placed(kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Slot]:
    """Where tensors of these types and shapes lie in a file, in their order there."""
    slots: dict[str, Slot] = {}
    start = 0
    for name in sorted(kinds, key=lambda name: _place(*kinds[name], name)):
        slots[name] = Slot(*kinds[name], start)
        start += slots[name].num_bytes
    return slots


def parse_tensors(content: Tensor, file: str) -> dict[str, Tensor]:
    """All tensors of a file. They share the memory of ``content`` where it is aligned for them.

    A name of a tied tensor leads to the same tensor as its other names.

    Args:
        content: the whole file, uint8, on any device.
        file: its name, for messages.

    Raises:
        CheckpointCorruptError: it is not a safetensors file as the format describes it.
    """
    head = content if content.is_cpu else _head(content).cpu()
    layout, behind = parse_layout(head.numpy().data, file, content.numel())
    data = behind if content.is_cpu else content[content.numel() - layout.data_bytes :]
    try:
        tensors = {name: _aligned(slot.view(data)) for name, slot in layout.slots.items()}
        return {**tensors, **{name: tensors[stored] for name, stored in layout.aliases.items()}}
    except (ValueError, LookupError, TypeError, RuntimeError, OverflowError) as error:
        raise _not_safetensors(file, error) from error


def _head(content: Tensor) -> Tensor:
    """The bytes of a file before its first tensor."""
    num_bytes = int.from_bytes(bytes(content[:LENGTH_BYTES].tolist()), "little")
    return content[: LENGTH_BYTES + min(num_bytes, MAX_HEADER_BYTES)]


def parse_layout(
    memory: memoryview, file: str, file_bytes: int | None = None
) -> tuple[Layout, memoryview]:
    """What a file holds, and the bytes of its tensors, which are not looked at.

    Args:
        memory: the whole file, or what comes before its first tensor.
        file: its name, for messages.
        file_bytes: of the whole file, where ``memory`` is not all of it.

    Raises:
        CheckpointCorruptError: it is not a safetensors file as the format describes it.
    """
    try:
        file_bytes = len(memory) if file_bytes is None else file_bytes
        header, data = _split(memory, file_bytes)
        data_bytes = file_bytes - (len(memory) - len(data))
        metadata = header.pop(METADATA, {})
        aliases: Any = parse_json(metadata.get(ALIASES, "{}").encode(), ALIASES)
        extra: Any = parse_json(metadata.get(EXTRA_STATE, "{}").encode(), EXTRA_STATE)
        slices: Any = parse_json(metadata.get(SLICES, "{}").encode(), SLICES)
        slots: dict[str, Slot] = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            slot = Slot(DTYPES[entry["dtype"]], tuple(entry["shape"]), end)
            if any(type(size) is not int or size < 0 for size in slot.shape):
                raise ValueError(f"{name} has the shape {entry['shape']}")
            end += slot.num_bytes
            if entry["data_offsets"] != [slot.start, end] or end > data_bytes:
                raise ValueError(
                    f"{name} should lie in bytes {slot.start} to {end} of {data_bytes}, the "
                    f"header says {entry['data_offsets']}"
                )
            slots[name] = slot
        if end != data_bytes:
            raise ValueError(f"{data_bytes - end} bytes follow the last tensor")
        if missing := sorted({str(stored) for stored in aliases.values()} - slots.keys()):
            raise ValueError(f"there is no {missing[0]}, which other names lead to")
        offsets = {name: _offsets(name, slots[name], told) for name, told in slices.items()}
        return Layout(slots, aliases, dict(extra), offsets), data
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_safetensors(file, error) from error


def _offsets(name: str, slot: Slot, told: Any) -> tuple[int, ...]:
    offsets = told[OFFSETS]
    if len(offsets) != len(slot.shape) or any(type(o) is not int or o < 0 for o in offsets):
        raise ValueError(f"the slice {name} of shape {list(slot.shape)} begins at {offsets}")
    return tuple(offsets)


def _not_safetensors(file: str, error: Exception) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{file} is not a safetensors file: {error!r:.500}; nothing else is ever loaded"
    )


def _split(memory: memoryview, file_bytes: int) -> tuple[dict[str, Any], memoryview]:
    num_bytes = int.from_bytes(memory[:LENGTH_BYTES], "little")
    if num_bytes > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise ValueError(f"its header would have {num_bytes} bytes, the file {file_bytes}")
    header = parse_json(memory[LENGTH_BYTES : LENGTH_BYTES + num_bytes].tobytes(), "its header")
    if not isinstance(header, dict):
        raise ValueError(f"its header is {kind_of(header)}, not an object")
    return header, memory[LENGTH_BYTES + num_bytes :]


def _require_supported(tensor: object, name: str, path: str) -> None:
    problem = None
    if not isinstance(tensor, Tensor):
        problem = kind_of(tensor, is_full=True)
    elif tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        problem = f"a tensor of layout {tensor.layout} on {tensor.device}"
    elif tensor.dtype not in DTYPE_NAMES:
        problem = f"a tensor of {tensor.dtype}"
    elif name == METADATA:
        problem = "called as the format calls its metadata"
    if problem is not None:
        raise UnsupportedStateError(
            f"{path}.{name} is {problem}; a checkpoint file holds dense tensors of "
            f"{', '.join(DTYPES)} only: convert it before it is saved"
        )


def _place(dtype: torch.dtype, shape: tuple[int, ...], name: str) -> tuple[bool, int, str]:
    """What tensors are ordered by within a file."""
    is_odd = math.prod(shape) * dtype.itemsize % ALIGNMENT_BYTES != 0
    return is_odd, -dtype.itemsize, name


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


def _identity(tensor: Tensor, name: str) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory seen in the same way."""
    if tensor.numel() == 0:
        return (name,)  # no memory: nothing can be shared
    tensor = tensor.detach()
    place = tensor.device, tensor.data_ptr()
    return (*place, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
