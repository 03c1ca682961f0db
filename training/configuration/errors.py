"""What is wrong with a configuration, in one line: the key, what was found, what to write."""

from __future__ import annotations

import difflib
import json
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from holdfast.training.errors import ConfigError

Table = dict[str, Any]

EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "iterable_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a number with a decimal point"),
    (str, "text"),
    (Mapping, "a table"),
    ((list, tuple), "a list"),
    ((date, time), "a date or time"),
)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint that names the nearest allowed name, whatever its case, then all of them."""
    choices = sorted(allowed)
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    hint = f"did you mean {by_lower[close[0]]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(choices)}"


def parse_value(text: str) -> Any:
    """The value that a text is in TOML; the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def explanation(
    error: ValidationError, model: type[BaseModel], table: Mapping[str, Any], prefix: str
) -> str:
    """What was found wrong with a table, key by key, each by its first complaint."""
    lines: dict[str, str] = {}
    for item in error.errors():
        place, value = _found(table, item["loc"], is_missing=item["type"] == "missing")
        key = _key(place, prefix)
        lines.setdefault(key, _line(dict(item), model, place, key, value))
    return "; ".join(lines.values())


def require_tables(model: type[BaseModel], table: Mapping[str, Any], prefix: str = "") -> None:
    """Make sure that what has keys of its own is a table, before tables are merged.

    A value in place of a table would hide the values that it replaces.

    Raises:
        ConfigError: it is not.
    """
    for name, value in table.items():
        info = model.model_fields.get(name)
        if info is None:
            continue
        section = _section(info.annotation)
        if (section or get_origin(info.annotation) is dict) and not isinstance(value, Mapping):
            raise ConfigError(_wrong_type("a table", section, f"{prefix}{name}", value))
        if section:
            require_tables(section, value, f"{prefix}{name}.")


def _line(item: Table, model: type[BaseModel], place: Sequence[Any], key: str, value: Any) -> str:
    if item["type"] == "extra_forbidden":
        owner = _section_at(model, place[:-1])
        return f"unknown key {key}; {nearest(str(place[-1]), owner.model_fields if owner else [])}"
    if item["type"] == "missing":
        return f"{key} is missing; it has no default"
    if item["type"] in EXPECTED:
        return _wrong_type(EXPECTED[item["type"]], _section_at(model, place), key, value)
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "must be", 1)
    if not place:
        return message
    found = "" if isinstance(value, Mapping) else f" = {_shown(value)}"
    return f"{key}{found}: {message}"


def _wrong_type(expected: str, section: type[BaseModel] | None, key: str, value: Any) -> str:
    found = next((name for kind, name in KINDS if isinstance(value, kind)), type(value).__name__)
    is_in_list = key.endswith("]")
    advice = "" if is_in_list else f"; write {_advice(expected, section, key, value)}"
    return f"{key} = {_shown(value)}: expected {expected}, found {found}{advice}"


def _advice(expected: str, section: type[BaseModel] | None, key: str, value: Any) -> str:
    """What to write instead."""
    if expected == "a table":
        names = f", KEY one of {', '.join(section.model_fields)}" if section else ""
        return f"{key}.KEY=VALUE{names}"
    if expected == "a list":
        return _in_quotes(key, json.dumps(_as_list(value), default=str, ensure_ascii=False))
    if expected == "text":
        has_parts = isinstance(value, (list, Mapping))
        return _in_quotes(key, json.dumps("name" if has_parts else str(value)))
    if expected == "true or false":
        return f"{key}=true or {key}=false"
    number = parse_value(value) if isinstance(value, str) else value
    if isinstance(number, float) and expected == "an integer" and number.is_integer():
        number = int(number)
    is_number = isinstance(number, int if expected == "an integer" else (int, float))
    usable = is_number and not isinstance(number, bool)
    return (
        f"{key}={number}" if usable else f"{key}={'3' if expected == 'an integer' else '0.5'}, say"
    )


def _in_quotes(key: str, text: str) -> str:
    return f"{key}={text}, in a shell with quotes: --set {shlex.quote(f'{key}={text}')}"


def _as_list(value: Any) -> list[Any]:
    """The list that a single value, or a text with commas or without quotes, was meant to be."""
    if not isinstance(value, str):
        return [value]
    items = [item.strip().strip("'\"") for item in value.strip().strip("[]()").split(",")]
    return [parse_value(item) for item in items if item]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value.isoformat() if isinstance(value, (date, time)) else repr(value)


def _found(
    table: Mapping[str, Any], location: Sequence[Any], *, is_missing: bool
) -> tuple[list[Any], Any]:
    """The part of a location that is in the table, and the value there.

    What follows in a location are the alternatives of a type, which are no keys.
    """
    value: Any = table
    for depth, part in enumerate(location):
        try:
            value = value[part]
        except (LookupError, TypeError):
            return list(location[: depth + 1 if is_missing else depth]), value
    return list(location), value


def _key(place: Sequence[Any], prefix: str) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return (prefix + "".join(parts).removeprefix(".")).removesuffix(".")


def _section(annotation: Any) -> type[BaseModel] | None:
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def _section_at(model: type[BaseModel], place: Sequence[Any]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in place:
        info = current.model_fields.get(str(part)) if current else None
        current = _section(info.annotation) if info else None
    return current
