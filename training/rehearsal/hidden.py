"""State that no checkpoint holds: what lies in attributes of the user's objects.

A resumed process builds these objects anew. What differs between an object that has trained and a
restored one is what a resume loses.
"""

from __future__ import annotations

import collections
import hashlib
import random
import re
import types
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.training.experiment.building import SeededMethod
from holdfast.training.experiment.streamed import Streamed

Kind = Literal["generator", "iterator", "network", "optimizer", "tensor", "value"]
Fingerprints = dict[str, tuple[Kind, str]]

MAX_DEPTH = 8
MAX_ITEMS = 256
MAX_LEAVES = 20_000
MAX_SAMPLED = 1_000_000
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
SCALARS = (bool, int, float, complex, str, bytes, type(None))
GENERATORS: dict[type, Callable[[Any], Any]] = {
    torch.Generator: lambda generator: generator.get_state().tolist(),
    np.random.Generator: lambda generator: generator.bit_generator.state,
    np.random.RandomState: lambda generator: [
        part.tolist() if isinstance(part, np.ndarray) else part for part in generator.get_state()
    ],
    random.Random: lambda generator: generator.getstate(),
}
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
CODE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    SeededMethod,
    Streamed,  # its place travels with each batch
)


def hidden_state(model: nn.Module, **objects: Any) -> Fingerprints:
    """What objects hold beyond the state dict of the model, by the path that leads there.

    Args:
        model: its parameters and persistent buffers are in every checkpoint.
        objects: by the name that their paths begin with; None is left out.
    """
    walk = _Walk({id(tensor) for tensor in model.state_dict(keep_vars=True).values()})
    walk.look(model, "model", "value", 0)
    for name, value in objects.items():
        if value is not None:
            kind: Kind = "optimizer" if name == "optimizers" else "value"
            walk.look(value, name.replace("_", " "), kind, 0)
    return walk.found


def module_state(source: types.ModuleType) -> Fingerprints:
    """What lies in the global names of a module."""
    walk = _Walk(set())
    for name, value in vars(source).items():
        if not name.startswith("__"):
            walk.look(value, f"global {name}", "value", 1)
    return walk.found


def state_of(names: Mapping[str, Any]) -> Fingerprints:
    """What lies in variables, by the path that leads there."""
    walk = _Walk(set())
    for name, value in names.items():
        walk.look(value, name, "value", 1)
    return walk.found


def own_attributes(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """What optimizers that are not torch's keep beside state and groups, by name."""
    of_every_optimizer = vars(torch.optim.SGD([torch.zeros(1)])).keys() | {"step", "_opt_called"}
    return {
        name or type(optimizer).__name__: {
            key: value for key, value in vars(optimizer).items() if key not in of_every_optimizer
        }
        for name, optimizer in optimizers.items()
        if not type(optimizer).__module__.startswith("torch.")
    }


@dataclass
class _Walk:
    """Looks at each object once."""

    known: set[int]
    found: Fingerprints = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)  # an id is unique while its object lives

    def look(self, value: Any, path: str, kind: Kind, depth: int) -> None:
        if isinstance(value, CODE) or len(self.found) >= MAX_LEAVES:
            return
        if isinstance(value, SCALARS):
            self.found[path] = (kind, repr(value)[:200])
            return
        if id(value) in self.known or depth > MAX_DEPTH:
            return
        self.known.add(id(value))
        self.kept.append(value)
        if not path.startswith("model"):
            kind = _kind(value) or kind
        fingerprint = _fingerprint(value)
        if fingerprint is not None:
            own, digest = fingerprint
            self.found[path] = (own if kind == "value" or own == "generator" else kind), digest
            return
        for name, item in _parts(value):
            self.look(item, f"{path}{name}", kind, depth + 1)


def _fingerprint(value: Any) -> tuple[Kind, str] | None:
    """Of a value without parts."""
    if isinstance(value, Tensor):
        return "tensor", tensor_digest(value)
    if isinstance(value, np.ndarray):
        return "tensor", array_digest(value)
    for kind, read in GENERATORS.items():
        if isinstance(value, kind):
            return "generator", hashlib.blake2b(repr(read(value)).encode()).hexdigest()
    if isinstance(value, types.GeneratorType):
        return "iterator", f"{value.__qualname__} at {value.gi_frame and value.gi_frame.f_lasti}"
    if isinstance(value, Iterator) and type(value).__module__ == "builtins":
        return "iterator", f"{length_hint(value, -1)} items left"
    return ("value", _told(value)) if type(value).__module__ == "itertools" else None


def _kind(value: Any) -> Kind | None:
    """Of what an experiment keeps beside the model."""
    if isinstance(value, nn.Module):
        return "network"
    return "optimizer" if isinstance(value, torch.optim.Optimizer) else None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of what an object is made of."""
    if isinstance(value, nn.Module):
        own = {name: item for name, item in vars(value).items() if name not in OF_EVERY_MODULE}
        parts = {**value._parameters, **value._buffers, **value._modules, **own}
        yield from ((f".{name}", item) for name, item in parts.items())
    elif isinstance(value, torch.optim.Optimizer):
        yield from ((f".state[{index}]", item) for index, item in enumerate(value.state.values()))
        for own in own_attributes({"": value}).values():
            yield from ((f".{name}", item) for name, item in own.items())
    elif isinstance(value, Mapping):
        yield "'s length", len(value)
        items = list(value.items())[:MAX_ITEMS]
        yield from ((f"[{str(key)[:40]!r}]", item) for key, item in items)
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        yield "'s length", len(value)
        ordered = _ordered(value) if isinstance(value, (set, frozenset)) else value
        yield from ((f"[{i}]", item) for i, item in enumerate(list(ordered)[:MAX_ITEMS]))
    elif hasattr(value, "__dict__"):
        yield from ((f".{name}", item) for name, item in vars(value).items())


def _ordered(items: Set[Any]) -> list[Any]:
    """A set's items by what they are called; by their place where that is an address."""
    told = [repr(item) for item in items]
    return list(items) if any(ADDRESS.search(text) for text in told) else sorted(told)


def _told(value: object) -> str:
    return ADDRESS.sub("", repr(value))


def tensor_digest(tensor: Tensor) -> str:
    """Type, shape and content; of a large tensor, that of some values spread over it."""
    if tensor.is_sparse or tensor.is_meta:
        return f"{tensor.layout} {list(tensor.shape)}"
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, flat.numel() // MAX_SAMPLED)].cpu().contiguous()
    digest = hashlib.blake2b(flat.view(torch.uint8).numpy().data).hexdigest() if len(flat) else ""
    return f"{tensor.dtype} {list(tensor.shape)} {digest}"


def array_digest(array: np.ndarray[Any, Any]) -> str:
    """As ``tensor_digest``."""
    flat = array.reshape(-1)[:: max(1, array.size // MAX_SAMPLED)]
    content = repr(flat.tolist()).encode() if array.dtype.hasobject else flat.tobytes()
    return f"{array.dtype} {list(array.shape)} {hashlib.blake2b(content).hexdigest()}"
