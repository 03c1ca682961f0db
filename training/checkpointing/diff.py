"""What differs between two checkpoints, and by how much.

Tensors are compared bit by bit, one after the other and in pieces, out of mapped files: memory
stays small however large they are. Digests are not looked at, so that the tensor that a flipped
bit has hit can be found by comparing with a copy.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.training.checkpointing.digests import ALGORITHM
from holdfast.training.checkpointing.loading import MODEL_NAME
from holdfast.training.checkpointing.local_files import read_file, require_plain_file
from holdfast.training.checkpointing.manager import RESUME_FILES
from holdfast.training.checkpointing.manifest import (
    STATE_NAME,
    TENSOR_SUFFIX,
    Manifest,
    part_name,
    read_manifest,
)
from holdfast.training.checkpointing.slices import MappedSlices, open_part
from holdfast.training.checkpointing.tensor_file import DTYPE_NAMES, MappedFile
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import CheckpointCorruptError, DataFormatError
from holdfast.training.runs.stored_json import STATE, parse_json, required_fields

CHUNK_ELEMENTS = 2**22
SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GENERATORS = "generators"
ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same on both sides.

    Attributes:
        section: model, optimizer, ema, generators, counters, scheduler, history, versions, ...
        name: of the tensor or the value within its section.
        a: the value in A; of a tensor its type and shape.
        b: the same of B.
        only_in: the side that has it, where the other one lacks it.
        num_differing: elements whose bytes differ; None unless these are tensors of one shape.
        num_elements: of each of the two tensors.
        max_abs: largest absolute difference, where there is one that is a number.
        num_nan: elements that differ, and whose difference is NaN.
    """

    section: str
    name: str
    a: Json = None
    b: Json = None
    only_in: Literal["A", "B"] | None = None
    num_differing: int | None = None
    num_elements: int | None = None
    max_abs: float | None = None
    num_nan: int = 0

    def __str__(self) -> str:
        if self.only_in is not None:
            return f"{self.name}: only in {self.only_in}"
        apart = "" if self.max_abs is None else f"{self.max_abs:.6g}"
        if self.num_elements is None:
            in_a, in_b = (json.dumps(value, ensure_ascii=False) for value in (self.a, self.b))
            return f"{self.name}: {in_a} in A, {in_b} in B{apart and f', by {apart}'}"
        by = apart and f", by at most {apart}"
        nan = f", {self.num_nan} of them beside a NaN" if self.num_nan else ""
        return f"{self.name}: {self.num_differing} of {self.num_elements} elements differ{by}{nan}"


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        a: folder of the one checkpoint.
        b: folder of the other.
        manifests: of A and of B.
        num_tensors: how many tensors were compared, by section.
        values: names of the sections of other values that were compared.
        not_compared: files that one or both lack because they were slimmed to weights; the name
            of one stands for its slices, too.
        differences: all there are, section by section.
    """

    a: Path
    b: Path
    manifests: tuple[Manifest, Manifest]
    num_tensors: Counter[str]
    values: list[str]
    not_compared: list[str]
    differences: list[Difference]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        sides = zip("ab", (self.a, self.b), self.manifests, strict=True)
        return {
            "is_equal": not self.differences,
            **{key: {"path": str(p), "step": m.step, "kind": m.kind} for key, p, m in sides},
            "num_tensors": dict(self.num_tensors),
            "values": self.values,
            "not_compared": self.not_compared,
            "differences": [asdict(difference) for difference in self.differences],
        }


def compare(a: Path, b: Path) -> Comparison:
    """Compare two checkpoint folders.

    When they were saved, why, and by which segment is no difference: a run that was interrupted
    has other segments. What a checkpoint of weights lacks for being one is not, either.

    Raises:
        CheckpointCorruptError: a file cannot be read as what it should be; names it.
        StorageError: it cannot be read for another reason.
    """
    left, right = read_manifest(a), read_manifest(b)
    parts_a, parts_b = ({part_name(file) for file in side.files} for side in (left, right))
    shared = parts_a & parts_b
    is_slim = "weights" in (left.kind, right.kind)
    not_compared = sorted(RESUME_FILES - shared) if is_slim else []
    values_a, values_b = _about(left), _about(right)
    if STATE_NAME in shared:
        values_a.update(_state(a, left))
        values_b.update(_state(b, right))
    num_tensors: Counter[str] = Counter()
    differences: list[Difference] = []
    for name in sorted((parts_a | parts_b) - {STATE_NAME, *not_compared}, key=_file_order):
        if name not in shared:
            side = _side(name in parts_a)
            differences.append(Difference(name.removesuffix(TENSOR_SUFFIX), name, only_in=side))
            continue
        first, second = _opened(a, left, name), _opened(b, right, name)
        for section, difference in _compare_tensors(first, second, frozenset(values_a)):
            num_tensors[section] += 1
            differences += difference
    for section in sorted({*values_a, *values_b}):
        sides = values_a.get(section, ABSENT), values_b.get(section, ABSENT)
        differences += _compare_values(section, "", *sides)
    sections = sorted(values_a.keys() & values_b.keys())
    return Comparison(a, b, (left, right), num_tensors, sections, not_compared, differences)


def _file_order(name: str) -> tuple[bool, str]:
    """The model comes first."""
    return name != MODEL_NAME, name


def _side(is_in_a: bool) -> Literal["A", "B"]:
    return "A" if is_in_a else "B"


def _about(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says that is not a matter of when it was written, or by which segment."""
    return {
        "counters": {"step": manifest.step, "epoch": manifest.epoch},
        "metrics": manifest.metrics,
        "config": manifest.config or {"digest": manifest.config_digest},
        "versions": {**manifest.versions, "device": manifest.device},
    }


def _state(folder: Path, manifest: Manifest) -> dict[str, Any]:
    entry, path = manifest.files[STATE_NAME], folder / STATE_NAME
    content, _ = read_file(path, ALGORITHM, entry.size_bytes)
    try:
        parsed = parse_json(content.numpy().tobytes(), str(path), STATE)
        state = required_fields(parsed, path, {})
    except DataFormatError as error:
        raise CheckpointCorruptError(f"{path} is not a JSON object: {error}") from error
    return {
        name: _groups_by_name(value) if name == "optimizer" else value
        for name, value in state.items()
    }


def _groups_by_name(optimizer: Any) -> Any:
    """What is kept of optimizers, with parameter groups that have names under these."""
    if not isinstance(optimizer, dict):
        return optimizer
    if isinstance(several := optimizer.get("optimizers"), dict):
        return {name: _groups_by_name(one) for name, one in several.items()}
    try:
        named = {group["options"]["name"]: group for group in optimizer["groups"]}
    except (LookupError, TypeError):
        return optimizer
    return {**optimizer, "groups": named} if len(named) == len(optimizer["groups"]) else optimizer


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a stem. ``stored`` leads from each name to the one that it is stored under."""

    stem: str
    mapped: MappedFile | MappedSlices
    stored: dict[str, str]

    def kind(self, name: str) -> str:
        """Type and shape, without reading the tensor."""
        slot = self.mapped.layout.slots[self.stored[name]]
        return f"{DTYPE_NAMES[slot.dtype]} {list(slot.shape)}"

    def tensor(self, name: str) -> Tensor:
        """The tensor, within the mapping where it lies in one file."""
        return self.mapped.tensor(self.stored[name])


def _opened(folder: Path, manifest: Manifest, part: str) -> _Tensors:
    for file in manifest.files_of(part):
        require_plain_file(folder / file, manifest.files[file].size_bytes)
    mapped = open_part(folder / part)
    stored = {**{name: name for name in mapped.layout.slots}, **mapped.layout.aliases}
    return _Tensors(part.removesuffix(TENSOR_SUFFIX), mapped, stored)


def _compare_tensors(
    a: _Tensors, b: _Tensors, sections: frozenset[str]
) -> Iterator[tuple[str, list[Difference]]]:
    """The section of each tensor of two files of one name, and its difference if there is one."""
    for name in sorted({*a.stored, *b.stored}):
        section = a.stem
        if section == "state":  # generators, and tensors in the state of some component
            component = name.partition("/")[0]
            section = component if component in sections else GENERATORS
        if name not in a.stored or name not in b.stored:
            yield section, [Difference(section, name, only_in=_side(name in a.stored))]
        elif a.kind(name) != b.kind(name):
            yield section, [Difference(section, name, a.kind(name), b.kind(name))]
        else:
            found = compare_elements(a.tensor(name), b.tensor(name))
            difference = Difference(section, name, a.kind(name), b.kind(name), **found)
            yield section, [difference] if difference.num_differing else []


def compare_elements(a: Tensor, b: Tensor) -> dict[str, Any]:
    """By how much two tensors of one type and shape differ; the same bytes are equal, NaN too.

    Returns ``num_differing``, ``num_elements``, ``max_abs`` and ``num_nan`` of a ``Difference``.
    """
    num_differing, num_nan, max_abs = 0, 0, None
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    bits = SAME_WIDTH[a.dtype.itemsize]
    for start in range(0, a.numel(), CHUNK_ELEMENTS):
        piece_a, piece_b = (flat[start : start + CHUNK_ELEMENTS] for flat in (flat_a, flat_b))
        differs = piece_a.view(bits) != piece_b.view(bits)
        if not differs.any():
            continue
        apart = (_wide(piece_a[differs]) - _wide(piece_b[differs])).abs().double()
        numbers = apart[~apart.isnan()]
        num_differing += apart.numel()
        num_nan += apart.numel() - numbers.numel()
        if numbers.numel():
            max_abs = max(max_abs or 0.0, numbers.max().item())
    return {
        "num_differing": num_differing,
        "num_elements": a.numel(),
        "max_abs": max_abs,
        "num_nan": num_nan,
    }


def _wide(tensor: Tensor) -> Tensor:
    """In a type in which a difference is exact enough to be told."""
    if tensor.dtype.is_complex:
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.dtype.is_floating_point else tensor.long()


def _compare_values(section: str, name: str, a: Any, b: Any) -> Iterator[Difference]:
    """Each leaf that differs; what one side lacks is told once, not leaf by leaf."""
    a, b = _plain(a), _plain(b)
    if a is ABSENT or b is ABSENT:
        yield Difference(section, name or section, only_in=_side(b is ABSENT))
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}, key=_natural_order):
            inner = f"{name}.{key}" if name else str(key)
            yield from _compare_values(section, inner, a.get(key, ABSENT), b.get(key, ABSENT))
    elif json.dumps(a) != json.dumps(b):
        is_number = all(type(value) in (int, float) for value in (a, b))
        apart = float(abs(a - b)) if is_number else math.nan
        max_abs = None if math.isnan(apart) else apart
        yield Difference(section, name or section, a, b, max_abs=max_abs)


def _plain(value: Any) -> Any:
    """Lists as dicts by index, tuples as lists, and numbers that JSON lacks as numbers."""
    if isinstance(value, dict) and len(value) == 1:
        [(key, inner)] = value.items()
        if key == "$tuple":
            return _plain(inner)
        if key == "$float" and inner in ("nan", "inf", "-inf"):
            return float(inner)
    return dict(enumerate(value)) if isinstance(value, list) else value


def _natural_order(key: str | int) -> tuple[bool, int, str]:
    return (True, 0, key) if isinstance(key, str) else (False, key, "")
