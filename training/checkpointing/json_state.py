"""State as tensors and JSON, and back.

A component's ``state_dict`` may nest dicts, lists, tuples, numbers, text, bytes and tensors. JSON
has no tuples, no bytes, no integer keys and no infinity, so these are written as a dict with one
key that begins with ``$``. Tensors go to a table of their own, under the path that leads to them;
none overwrites another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.training.configuration.schema import Json
from holdfast.training.errors import CheckpointCorruptError, UnsupportedStateError, kind_of

Tensors = dict[str, Tensor]
PAIRS = "$pairs"


def encode(value: Any, path: str, tensors: Tensors, *, keeps_order: bool = False) -> Json:
    """The JSON of a value. Tensors that it holds are added to ``tensors`` under their paths.

    Files have the keys of JSON objects sorted. With ``keeps_order`` dicts come back in the order
    in which they are, since somebody's own state may be gone through in it.

    Raises:
        UnsupportedStateError: something is neither JSON nor a tensor; the message names its path.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) and type(value) in (int, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return {"$tensor": _put(value.detach(), path, tensors)}
    if isinstance(value, bytes):
        return {"$bytes": _put(torch.tensor(list(value), dtype=torch.uint8), path, tensors)}
    if isinstance(value, (list, tuple, Mapping)):
        return _encode_nest(value, path, tensors, keeps_order)
    raise UnsupportedStateError(
        f"{path} is {kind_of(value, is_full=True)}; a checkpoint holds "
        f"tensors and JSON only: return numbers, text, lists, dicts or tensors from state_dict()"
    )


def decode(value: Json, tensors: Mapping[str, Tensor]) -> Any:
    """The value that ``encode`` was given."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and next(iter(value)).startswith("$"):
        return _decode_tagged(*next(iter(value.items())), tensors)
    return {key: decode(item, tensors) for key, item in value.items()}


def _put(tensor: Tensor, path: str, tensors: Tensors) -> str:
    """Add a tensor under its path, or under one nearby where another tensor has that path.

    Different keys may lead to one path: 1 and "1", "a/b" and b within a, all keys that are bytes.
    """
    name, number = path, 2
    while name in tensors:
        name, number = f"{path}~{number}", number + 1
    tensors[name] = tensor
    return name


def _encode_nest(
    value: list[Any] | tuple[Any, ...] | Mapping[Any, Any],
    path: str,
    tensors: Tensors,
    keeps_order: bool,
) -> Json:
    def encoded(item: Any, key: Any) -> Json:
        return encode(item, f"{path}/{key}", tensors, keeps_order=keeps_order)

    if isinstance(value, list):
        return [encoded(item, i) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": encode(list(value), path, tensors, keeps_order=keeps_order)}
    is_plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
    if is_plain and not (keeps_order and list(value) != sorted(value)):
        return {key: encoded(item, key) for key, item in value.items()}
    return {PAIRS: [[encoded(key, "key"), encoded(item, key)] for key, item in value.items()]}


def _decode_tagged(tag: str, content: Json, tensors: Mapping[str, Tensor]) -> Any:
    if tag == "$float":
        return float(str(content))
    if tag == "$tuple":
        return tuple(decode(content, tensors))
    if tag == PAIRS and isinstance(content, list):
        return {key: item for key, item in decode(content, tensors)}
    if tag in ("$tensor", "$bytes"):
        tensor = tensors.get(str(content))
        if tensor is None:
            raise CheckpointCorruptError(f"state.json refers to a tensor {content!r} that is gone")
        return tensor.clone() if tag == "$tensor" else bytes(tensor.tolist())
    raise CheckpointCorruptError(f"state.json has an unknown tag {tag!r}")
