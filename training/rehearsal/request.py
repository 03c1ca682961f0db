"""What a rehearsal is asked for, and how its process tells what it finds: lines of JSON in files.

The process writes one line as soon as it knows something, so that what it found is known even
where it is killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from holdfast.training.errors import ConfigError

Depth = Literal["none", "step", "export"]
DEPTH_VARIABLE = "HOLDFAST_REHEARSAL_DEPTH"
DEFAULT_DEPTH: Depth = "export"


@dataclass(frozen=True)
class RehearsalRequest:
    """An experiment as it is to be trained.

    Attributes:
        experiment, config_file, overrides: as on the command line.
        store: where the run will lie; nothing is written there.
        folder: a folder to throw away, for all that the rehearsal writes.
        depth: how much is tried, for ``rehearsal.depth``; None leaves it to the configuration.
        search_path: where the parent finds modules; the user's may lie where it was started.
    """

    experiment: str
    store: str
    folder: str
    num_threads: int
    config_file: str | None = None
    overrides: tuple[str, ...] = ()
    depth: Depth | None = None
    search_path: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file of the request."""
        return Path(self.folder) / "request.json"

    @property
    def told(self) -> Path:
        """The file of what is told."""
        return Path(self.folder) / "told.jsonl"

    @property
    def log(self) -> Path:
        """What the process, the user's code included, prints."""
        return Path(self.folder) / "output.log"

    def write(self) -> None:
        """Write the request to its file."""
        self.path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> RehearsalRequest:
        """The request that a parent wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(values[name]) for name in ("overrides", "search_path")}
        return cls(**{**values, **lists})


def resolved_depth(configured: str | None, environment: Mapping[str, str] = os.environ) -> Depth:
    """``rehearsal.depth``; unset takes ``HOLDFAST_REHEARSAL_DEPTH``, then ``export``.

    Raises ConfigError where the variable holds something else.
    """
    depth = configured or environment.get(DEPTH_VARIABLE) or DEFAULT_DEPTH
    if depth not in get_args(Depth):
        raise ConfigError(
            f"{DEPTH_VARIABLE} = {depth!r} is not a depth of the rehearsal; "
            f"allowed: {', '.join(get_args(Depth))}"
        )
    return cast(Depth, depth)


def tell(path: Path, kind: str, **values: Any) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, **values}, default=str) + "\n")


def read_told(path: Path) -> list[dict[str, Any]]:
    """All whole lines so far."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
