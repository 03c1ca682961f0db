"""From files and overrides to a RunConfig, and from a RunConfig to its digest."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from holdfast.training.configuration.errors import (
    Table,
    explanation,
    nearest,
    parse_value,
    require_tables,
)
from holdfast.training.configuration.schema import RunConfig, Section, SelectionConfig
from holdfast.training.errors import ConfigError

__all__ = [
    "asked_num_threads",
    "config_digest",
    "config_from_record",
    "digest_rule",
    "digested_values",
    "experiment_settings",
    "is_choice_only",
    "nearest",
    "parsed_override",
    "read_toml",
    "resolve_config",
    "validated",
    "void_with",
]

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
    sources = [dict(defaults or {})]
    if file is not None:
        sources.append(read_toml(file))
    asked: Table = {}
    for number, source in enumerate(itertools.chain(sources, map(_parse_override, overrides))):
        require_tables(RunConfig, source)
        require_tables(settings_class, source.get("experiment", {}), "experiment.")
        _merge(table, source)
        if number > 0:
            _merge(asked, source)
    _require_mode(sources[0].get("selection", {}), asked.get("selection", {}))
    config = validated(RunConfig, table, prefix="")
    settings = validated(settings_class, config.experiment, prefix="experiment.")
    experiment = settings.model_dump(mode="json", exclude=_as_before(settings))
    return config.model_copy(update={"experiment": experiment})


def experiment_settings(settings_class: type[S], config: RunConfig) -> S:
    """The ``[experiment]`` table as an instance of the experiment's own class."""
    return validated(settings_class, config.experiment, prefix="experiment.")


def config_from_record(resolved: Mapping[str, Any]) -> RunConfig:
    """The configuration that ``run.json`` holds."""
    return validated(RunConfig, dict(resolved), prefix="")


def config_digest(config: RunConfig) -> str:
    """``sha256:<hex>`` over everything that changes the result of a run."""
    text = json.dumps(digested_values(config), sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def digested_values(section: BaseModel) -> Table:
    """The fields of a section, and of the sections below it, that the digest covers."""
    values: Table = {}
    dumped = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        value, rule = getattr(section, name), digest_rule(info)
        if rule == "no" or (rule == "unless default" and value == info.get_default()):
            continue
        other, always = void_with(info), always_digested(info)
        if other is not None and getattr(section, other) is not None and value != always:
            continue
        values[name] = digested_values(value) if isinstance(value, BaseModel) else dumped[name]
    return {name: value for name, value in values.items() if value != {} or name == "experiment"}


def validated(model: type[S], table: Mapping[str, Any], *, prefix: str) -> S:
    """A table as an instance of a model; ``prefix`` comes before its keys in errors.

    Read as JSON, which has lists and texts in place of tuples and paths: strict, and yet whole.

    Raises:
        ConfigError: a key is unknown, or a value is not allowed.
    """
    try:
        text = json.dumps(table, default=str, ensure_ascii=False).encode()
        return model.model_validate_json(text)
    except UnicodeEncodeError as error:
        raise ConfigError(f"the configuration holds {error.object!r}: not UTF-8 text") from None
    except ValidationError as error:
        raise ConfigError(explanation(error, model, table, prefix)) from None


def digest_rule(info: FieldInfo) -> str:
    """Whether a field is part of the digest: ``yes``, ``no`` or ``unless default``."""
    extra = info.json_schema_extra
    return str(extra.get("digest", "yes")) if isinstance(extra, dict) else "yes"


def void_with(info: FieldInfo) -> str | None:
    """The field of the same section that, where it is set, takes this one out of the digest."""
    extra = info.json_schema_extra
    found = extra.get("unless_set") if isinstance(extra, dict) else None
    return None if found is None else str(found)


def always_digested(info: FieldInfo) -> str | None:
    """The value with which ``void_with`` does not count."""
    extra = info.json_schema_extra
    found = extra.get("unless_value") if isinstance(extra, dict) else None
    return None if found is None else str(found)


def is_choice_only(key: str, section: type[BaseModel] = RunConfig) -> bool:
    """Whether a dotted key changes which weights win and nothing else."""
    name, _, rest = key.partition(".")
    info = section.model_fields.get(name)
    if info is None:
        return False
    if rest and isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
        return is_choice_only(rest, info.annotation)
    return isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("choice") is True


def asked_num_threads(overrides: Sequence[str], file: Path | None) -> int | None:
    """``train.num_threads`` where it is asked for: a process must know it before it starts."""
    for override in reversed(overrides):
        key, _, value = override.partition("=")
        if key.strip() == "train.num_threads" and value.strip().isdecimal():
            return max(1, int(value))
    train = {} if file is None else read_toml(file).get("train")
    configured = train.get("num_threads") if isinstance(train, dict) else None
    return configured if isinstance(configured, int) and configured > 0 else None


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


def _require_mode(preferred: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Who chooses by another metric says which direction is good; the default's may be wrong.

    Raises ConfigError where it is not said.
    """
    usual = preferred.get("metric", SelectionConfig().metric)
    if asked.get("metric", usual) != usual and "mode" not in asked:
        raise ConfigError(
            f"selection.metric = {asked['metric']!r}: is more of it better, or less? Say so with "
            "selection.mode=max or selection.mode=min"
        )
    if asked.get("metric", usual) == "loss" and asked.get("mode") == "max":
        raise ConfigError(
            "selection.mode = 'max' would choose the largest loss: training makes it small; write "
            "selection.mode=min, or name the metric that is meant in selection.metric"
        )


def _as_before(settings: BaseModel) -> set[str]:
    """Settings that an experiment was given after its first release, where they say nothing new."""
    return {
        name
        for name, info in type(settings).model_fields.items()
        if digest_rule(info) == "unless default" and getattr(settings, name) == info.get_default()
    }


def parsed_override(override: str) -> tuple[str, Any]:
    """Dotted key and value of ``section.key=value``. Raises ConfigError."""
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    return ".".join(parts), parse_value(text.strip())


def _parse_override(override: str) -> Table:
    key, value = parsed_override(override)
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


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
