"""From files and overrides to a RunConfig, and from a RunConfig to its digest."""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from training.config import RunConfig, Section
from training.errors import ConfigError

Table = dict[str, Any]
S = TypeVar("S", bound=BaseModel)
NAMED_SECTIONS = ("optimizer", "scheduler")  # a new name there makes the old args meaningless


def resolve_config(
    *,
    settings_class: type[Section],
    defaults: Mapping[str, Any] | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
) -> RunConfig:
    """The configuration of a run, complete and validated.

    Args:
        settings_class: what validates the ``[experiment]`` table.
        defaults: what the experiment prefers to the general defaults.
        file: a TOML file.
        overrides: ``section.key=value``; the value is read as TOML, and as text where it is none.

    Raises:
        ConfigError: a key is unknown, a value is not allowed, or the file cannot be read.
    """
    table: Table = {}
    _merge(table, defaults or {})
    if file is not None:
        _merge(table, read_toml(file))
    for override in overrides:
        _merge(table, _parse_override(override))
    config = _validate(RunConfig, table, prefix="")
    settings = _validate(settings_class, config.experiment, prefix="experiment.")
    return config.model_copy(update={"experiment": settings.model_dump(mode="json")})


def experiment_settings(settings_class: type[S], config: RunConfig) -> S:
    """The ``[experiment]`` table as an instance of the experiment's own class."""
    return _validate(settings_class, config.experiment, prefix="experiment.")


def config_from_record(resolved: Mapping[str, Any]) -> RunConfig:
    """The configuration that ``run.json`` holds."""
    return _validate(RunConfig, dict(resolved), prefix="")


def config_digest(config: RunConfig) -> str:
    """``sha256:<hex>`` over everything that changes the result of a run."""
    text = json.dumps(digested_values(config), sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def digested_values(section: BaseModel) -> Table:
    """The fields of a section, and of the sections below it, that the digest covers."""
    values: Table = {}
    dumped = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("digest") is False:
            continue
        value = getattr(section, name)
        values[name] = digested_values(value) if isinstance(value, BaseModel) else dumped[name]
    return {name: value for name, value in values.items() if value != {} or name == "experiment"}


def read_toml(file: Path) -> Table:
    """The tables of a TOML file. Raises ConfigError where it is missing or malformed."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file {file} is not valid TOML: {error}") from error


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint that names the nearest allowed name, then all of them."""
    choices = sorted(allowed)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(choices)}"


def _parse_override(override: str) -> Table:
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    value: Any = _parse_value(text.strip())
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(target: Table, source: Mapping[str, Any]) -> None:
    """Put source over target, table by table."""
    for key, value in source.items():
        current = target.get(key)
        if not (isinstance(value, Mapping) and isinstance(current, dict)):
            target[key] = _copied(value)
            continue
        if key in NAMED_SECTIONS and value.get("name", current.get("name")) != current.get("name"):
            current.pop("args", None)
        _merge(current, value)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _validate(model: type[S], table: Any, *, prefix: str) -> S:
    try:
        return model.model_validate(table)
    except ValidationError as error:
        lines = [_explain(model, dict(item), prefix) for item in error.errors()]
        raise ConfigError("; ".join(lines)) from None


def _explain(model: type[BaseModel], item: Table, prefix: str) -> str:
    """One line that names the key, what was found and what is allowed."""
    location = [str(part) for part in item["loc"]]
    key = prefix + ".".join(location)
    if item["type"] == "extra_forbidden":
        owner = _section_at(model, location[:-1])
        names = list(owner.model_fields) if owner else []
        return f"unknown key {key}; {nearest(location[-1], names)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not location:
        return message
    return f"{key} = {item['input']!r}: {message}"


def _section_at(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    current: Any = model
    for part in location:
        info = current.model_fields.get(part)
        if info is None or not isinstance(info.annotation, type):
            return None
        if not issubclass(info.annotation, BaseModel):
            return None
        current = info.annotation
    return current if isinstance(current, type) else None
