"""``python -m holdfast.training configuration``: the page of all keys, read from the schema."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from holdfast.training.configuration.loading import (
    always_digested,
    digest_rule,
    is_choice_only,
    void_with,
)
from holdfast.training.configuration.schema import RunConfig, Section

HEAD = """\
# Configuration

`python -m holdfast.training configuration` writes this page from
`training/configuration/schema.py`.

Values come from four places; a later one wins:

1. the defaults below;
2. the defaults of the experiment, its class attribute `defaults`;
3. a TOML file: `--config run.toml`;
4. overrides: `--set section.key=value`, as often as needed.

```toml
seed = 1

[train]
num_epochs = 20

[optimizer]
name = "SGD"
args = {lr = 0.1, momentum = 0.9}
```

```bash
python -m holdfast.training segment --experiment digits --store runs --run-id first \\
    --config run.toml --set train.clip_norm=1.0 --set 'ema.decays=[0.99, 0.999]'
```

The value of an override is TOML, and text where it is none; a shell wants quotes around lists and
tables. Nothing is converted: `"3"`, `3.0` and `true` are no integers, `"yes"` is no boolean; but an
integer is a number, too. An unknown key, or a value that is not allowed, ends with exit code 2 and
one line that says what to write. `optimizer.args` and `scheduler.args` are held against the
constructor of the class. Another `optimizer.name` or `scheduler.name` drops the `args` of
the places before.

`run.json` keeps the resolved configuration and its digest. The digest covers what changes the
result: a run id belongs to one digest, and another one is refused. What is not part of it may
differ from segment to segment. What is marked `choice` is part of it, and may yet be changed in a
run that was begun: it changes which of the weights that training left win, not the training.

`train.num_threads`: the first segment takes it, else `OMP_NUM_THREADS`, else all cores of its
machine, and records the number in `run.json`. Later segments keep to the record, whatever machine
they are on; the key is part of the digest, so that it cannot be set to another number later.
"""


@click.command("configuration", epilog="Exit codes: 0 printed, 2 wrong input.")
def configuration() -> None:
    """Print all keys of the configuration: type, default, meaning, part of the digest."""
    click.echo(configuration_page(), nl=False)


def configuration_page() -> str:
    """All keys of the configuration, as Markdown."""
    top = {name: info for name, info in RunConfig.model_fields.items() if not _section(info)}
    parts = [HEAD, "## Top level\n", _table(top, "")]
    for name, info in RunConfig.model_fields.items():
        section = _section(info)
        if section is not None:
            parts += [f"## {name}\n", f"{section.__doc__}\n"]
            parts.append(_table(section.model_fields, f"{name}."))
    return "\n".join(parts)


def _table(fields: Mapping[str, FieldInfo], prefix: str) -> str:
    lines = ["| key | type | default | meaning | digest |", "|---|---|---|---|---|"]
    for name, info in fields.items():
        meaning = (info.description or "").replace("\n", " ").replace("|", "\\|")
        kind = f"{_type(info.annotation)}{_limits(info.metadata)}"
        digest = "choice" if is_choice_only(f"{prefix}{name}") else digest_rule(info)
        if (other := void_with(info)) is not None:
            digest += f", without `{other}`"
            digest += f" or with `{always}`" if (always := always_digested(info)) else ""
        described = f"{kind} | {_default(info)} | {meaning} | {digest}"
        lines.append(f"| `{prefix}{name}` | {described} |")
    return "\n".join(lines) + "\n"


def _section(info: FieldInfo) -> type[Section] | None:
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "boolean",
    str: "text",
    Path: "path",
}


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(kind) for kind in arguments if kind is not types.NoneType)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin is tuple:
        return f"list of {_several(arguments[0])}"
    if origin is dict:
        return "table" if arguments[1] is Any else f"table of {_several(arguments[1])}"
    return NAMES[annotation]


def _several(annotation: Any) -> str:
    return f"{NAMES[annotation]}s" if annotation in NAMES else _type(annotation)


LIMITS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "not empty"}


def _limits(metadata: Sequence[Any]) -> str:
    texts = [text for item in metadata for text in _limit_texts(item)]
    return f" {', '.join(texts)}" if texts else ""


def _limit_texts(item: Any) -> Iterator[str]:
    for name, text in LIMITS.items():
        if hasattr(item, name):
            yield text.format(_number(getattr(item, name)))


def _number(value: Any) -> str:
    is_power = isinstance(value, int) and value > 2**32 and value.bit_count() == 1
    return f"2^{value.bit_length() - 1}" if is_power else str(value)


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "unset"
    if isinstance(value, Mapping):
        items = ", ".join(f"{name} = {json.dumps(item)}" for name, item in value.items())
        return f"`{{{items}}}`"
    return f"`{json.dumps(value)}`"
