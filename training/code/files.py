"""Which files travel with a run: the code beside a script or experiment, and its settings.

Neither data nor secrets: only files of a few kinds, none that is large, none in a hidden folder,
and none whose name says that it holds a secret. ``.holdfastignore`` beside the script leaves out
more, or, with ``!`` before a pattern, takes files of other kinds along.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from holdfast.training.errors import InputError

IGNORE_NAME = ".holdfastignore"
CODE = ("*.py",)
SETTINGS = ("*.toml", "*.yaml", "*.yml", "*.json", "*.cfg", "*.ini")
SECRETS = (
    "*secret*",
    "*credential*",
    "*passw*",
    "*api_key*",
    "*apikey*",
    "*private_key*",
    "*service_account*",
    "*service-account*",
    "token.*",
    "*_token.*",
    "*-token.*",
    "auth.json",
    "kaggle.json",
    "id_rsa*",
    "id_ed25519*",
    "*.env",
    "*.key",
    "*.pem",
    "*.p12",
    "*.pfx",
)
FOLDERS = (".*", "__pycache__", "*.egg-info", "build", "dist", "node_modules", "site-packages")
ENVIRONMENT = "pyvenv.cfg"
MAX_SETTINGS_BYTES = 256 * 2**10
MAX_BYTES = 16 * 2**20
MAX_FILES = 2000
MAX_LOOKED_AT = 50_000


class CodeTooLargeError(InputError):
    """More lies beside a script than travels with its run."""


@dataclass(frozen=True)
class Ignored:
    """What ``.holdfastignore`` says. Patterns are of names, or of paths from its folder.

    Attributes:
        left_out: patterns of files and folders.
        taken: patterns of files that are taken along whatever their kind, with ``!`` before them.
    """

    left_out: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()


def travelling_files(entry: Path) -> dict[str, bytes]:
    """The files that travel with a script or the file of an experiment, by their path beside it.

    Empty where ``.holdfastignore`` leaves the script itself out: then nothing travels. Folders are
    entered where they hold Python files; links are not followed.

    Raises CodeTooLargeError, which says how to take less along, or OSError.
    """
    root = entry.parent
    ignored = read_ignored(root)
    if _matches(entry.name, entry.name, ignored.left_out):
        return {}
    found = {entry.name: entry.read_bytes()}
    num_bytes = len(found[entry.name])
    for name, file in _files_below(root, ignored):
        num_bytes += file.stat().st_size
        if num_bytes > MAX_BYTES or len(found) >= MAX_FILES:
            raise CodeTooLargeError(
                f"the code beside {entry} is more than {MAX_BYTES // 2**20} MiB or {MAX_FILES} "
                f"files: name folders that the training does not need in {root / IGNORE_NAME}"
            )
        found[name] = file.read_bytes()
    return found


def read_ignored(folder: Path) -> Ignored:
    """The ``.holdfastignore`` of a folder; nothing where there is none."""
    try:
        text = (folder / IGNORE_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Ignored()
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    return Ignored(
        left_out=tuple(line.strip("/") for line in lines if not line.startswith("!")),
        taken=tuple(line[1:].strip("/") for line in lines if line.startswith("!")),
    )


def _files_below(root: Path, ignored: Ignored) -> Iterator[tuple[str, Path]]:
    num_seen, waiting = 0, [root]
    while waiting:
        folder = waiting.pop()
        entries = []
        for entry in os.scandir(folder):
            entries.append(entry)
            num_seen += 1
            if num_seen > MAX_LOOKED_AT:
                raise CodeTooLargeError(
                    f"more than {MAX_LOOKED_AT:,} files lie beside {root}: name folders that hold "
                    f"no code in {root / IGNORE_NAME}"
                )
        if folder != root and not _is_of_code(entries):
            continue
        for entry in sorted(entries, key=lambda one: one.name):
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            if entry.is_symlink() or _matches(entry.name, name, ignored.left_out):
                continue
            if entry.is_dir():
                waiting += [] if _matches(entry.name, name, FOLDERS) else [path]
            elif entry.is_file() and _is_taken(entry, name, ignored):
                yield name, path


def _is_of_code(entries: list[os.DirEntry[str]]) -> bool:
    names = [entry.name for entry in entries]
    return ENVIRONMENT not in names and any(name.endswith(".py") for name in names)


def _is_taken(entry: os.DirEntry[str], name: str, ignored: Ignored) -> bool:
    if _matches(entry.name.lower(), name.lower(), SECRETS):
        return False
    if _matches(entry.name, name, (*CODE, *ignored.taken)):
        return True
    is_hidden = entry.name.startswith(".")
    is_small = entry.stat().st_size <= MAX_SETTINGS_BYTES
    return not is_hidden and is_small and _matches(entry.name, name, SETTINGS)


def _matches(name: str, path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, one) or fnmatchcase(path, one) for one in patterns)
