"""Nests of tensors: dicts, lists, tuples, named tuples and dataclasses, to any depth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

Key = Any
Path = tuple[Key, ...]


def is_record(value: object) -> bool:
    """Whether a value has fields by name: a named tuple, or an instance of a dataclass."""
    is_named_tuple = isinstance(value, tuple) and hasattr(value, "_fields")
    return is_named_tuple or (is_dataclass(value) and not isinstance(value, type))


def children(nest: Any) -> Sequence[tuple[Key, Any]] | None:
    """What a container holds, with its key, name or number; None for what is no container.

    An output object of transformers, which is a dict and a dataclass, is taken for the dict.
    """
    if isinstance(nest, Mapping):
        return list(nest.items())
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return list(zip(nest._fields, nest, strict=True))
    if isinstance(nest, (tuple, list)):
        return list(enumerate(nest))
    if is_record(nest):
        return [(field.name, getattr(nest, field.name)) for field in fields(nest)]
    return None


def with_each(function: Callable[[Any], Any], nest: Any) -> Any:
    """A container of the same kind with ``function`` of each thing in it; all else as it is."""
    if type(nest) in (tuple, list):  # a step's way, hence short
        return type(nest)([function(value) for value in nest])
    held = children(nest)
    return nest if held is None else _filled(nest, [(key, function(v)) for key, v in held])


def mapped(function: Callable[[Any], Any], nest: Any) -> Any:
    """The nest with ``function`` of each leaf in its place; each container keeps its kind."""
    if children(nest) is None:
        return function(nest)
    return with_each(lambda value: mapped(function, value), nest)


def leaves(nest: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All leaves with the keys that lead to them, in the order in which ``mapped`` goes."""
    held = children(nest)
    if held is None:
        yield path, nest
        return
    for key, value in held:
        yield from leaves(value, (*path, key))


def _filled(nest: Any, held: Sequence[tuple[Key, Any]]) -> Any:
    """A container of the same kind that holds something else."""
    values = [value for _, value in held]
    if isinstance(nest, MutableMapping) and type(nest) is not dict:
        filled: Any = copy.copy(nest)  # its constructor may take anything
        for key, value in held:
            filled[key] = value
        return filled
    if isinstance(nest, Mapping):
        return dict(held)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*values)
    if isinstance(nest, (tuple, list)):
        return type(nest)(values)
    filled = copy.copy(nest)
    for name, value in held:
        object.__setattr__(filled, name, value)  # a dataclass may be frozen
    return filled


def default_collated(items: list[Any]) -> Any:
    """As ``torch.utils.data.default_collate``, of dataclasses as well."""
    from torch.utils.data._utils.collate import collate, default_collate_fn_map

    own: dict[Any, Any] = dict.fromkeys(_dataclasses(items[0]), _collated_fields)
    return collate(items, collate_fn_map={**own, **default_collate_fn_map})


def _dataclasses(nest: Any) -> Iterator[type]:
    """Those in a nest that are no containers of torch's own collation."""
    if is_dataclass(nest) and not isinstance(nest, (Mapping, tuple, list, type)):
        yield type(nest)
    for _, value in children(nest) or ():
        yield from _dataclasses(value)


def _collated_fields(items: list[Any], *, collate_fn_map: Any) -> Any:
    """One dataclass of batches; a field that is None in all items stays None."""
    from torch.utils.data._utils.collate import collate

    def collated(values: list[Any]) -> Any:
        if all(value is None for value in values):
            return None
        return collate(values, collate_fn_map=collate_fn_map)

    names = [field.name for field in fields(items[0])]
    batches = [(name, collated([getattr(item, name) for item in items])) for name in names]
    return _filled(items[0], batches)
