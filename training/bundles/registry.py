"""Bundles by name and version, and aliases that move and remember where they were.

Imports the standard library alone: whoever pulls a bundle needs no torch.

    <store>/registry/<name>/versions/000003/          a bundle
    <store>/registry/<name>/aliases/<alias>/000007.json   the alias's seventh position

An alias stands where its highest number says. A move links the next number into place, which
succeeds for exactly one of several movers; nothing is ever overwritten, so the history is there.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.training.bundles import consumer
from holdfast.training.bundles.sources import BundleSource, FolderSource
from holdfast.training.errors import BundleError, DataFormatError, InputError, StorageError
from holdfast.training.runs.durable_json import (
    FULL_ERRNOS,
    create_json_durably,
    storage_error,
    sync_folder,
)
from holdfast.training.runs.paths import checked_store
from holdfast.training.runs.stored_json import Kinds, read_json, required_fields

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import Json

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
NUMBER = re.compile(r"[0-9]{6}|[1-9][0-9]{6,14}")
PARTIAL = re.compile(r"\.[0-9a-f]{12}\.partial")
MOVE: Kinds = {"moved_at": (str,), "reason": (str,), "version": (int,)}
REGISTRY = "registry"
VERSION_DIGITS = 6
MAX_ATTEMPTS = 100
ABANDONED_S = 24 * 3600.0  # no publication takes that long
DEFAULT_ALIAS = "champion"


@dataclass(frozen=True)
class BundleReference:
    """``NAME``, ``NAME@3`` or ``NAME@alias``; without ``@`` the alias ``champion`` is meant."""

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> BundleReference:
        """Raises InputError for a name or alias that could be a path."""
        name, _, which = text.partition("@")
        which = which or DEFAULT_ALIAS
        checked_name(name), checked_name(which)
        if which.isdecimal():
            return cls(name, version=int(which))
        return cls(name, alias=which)


def checked_alias(text: str) -> str:
    """Raises InputError for an alias that could be a path, or would be taken for a version."""
    if text.isdecimal():
        raise InputError(f"alias {text!r} would be taken for a version; choose a word")
    return checked_name(text)


@dataclass(frozen=True)
class AliasMove:
    """One position of an alias."""

    number: int
    version: int
    moved_at: str
    reason: str


class Registry:
    """All bundles of a store.

    Attributes:
        folder: ``<store>/registry``; it is created by the first publication.

    Raises InputError for a store that is a file.
    """

    def __init__(self, store: Path) -> None:
        self.folder = checked_store(store) / REGISTRY

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def told_store(self) -> str:
        """How the store is named to people and on the command line."""
        return str(self.folder.parent)

    def names(self) -> list[str]:
        """Names that have at least one version. Raises StorageError."""
        found = [name for name in _listed(self.folder) if NAME.fullmatch(name)]
        return [name for name in found if (self.folder / name / "versions").is_dir()]

    def versions(self, name: str) -> list[int]:
        """Published versions, ascending. Raises StorageError."""
        return _numbers(self.folder / checked_name(name) / "versions")

    def bundle(self, name: str, version: int) -> Path:
        """The folder of a version, whether it is there or not."""
        return self.folder / checked_name(name) / "versions" / numbered(version)

    def manifest(self, name: str, version: int) -> dict[str, Any]:
        """The manifest of a version. Raises BundleError where it is altered."""
        try:
            return consumer.read_manifest(self.bundle(name, version))
        except consumer.RefusedBundleError as error:
            raise BundleError(str(error)) from error

    def source(self, name: str, version: int) -> BundleSource:
        """Where a version is pulled from."""
        return FolderSource(self.bundle(name, version))

    def publish(self, source: Path) -> tuple[str, int]:
        """Copy a verified bundle in under its name; the name and its new version.

        The same bundle again gives its old version, also where only what was measured while it was
        made differs: times and latencies. After return the copy is durable and was
        verified; before that there is none. Raises BundleError if ``source`` does not verify, or
        StorageError.
        """
        manifest, name, known = self._publishable(source)
        if known is not None:
            return name, known
        versions = self.folder / name / "versions"
        staging = versions / f".{secrets.token_hex(6)}.partial"
        try:
            versions.mkdir(parents=True, exist_ok=True)
            _require_own(versions)
            _clear_abandoned(versions)
            _copy_tree(source, staging)
            _verified(staging)
            _sync_tree(staging)
            return name, self._move_into_place(name, staging)
        except OSError as error:
            size_bytes = sum(entry["size_bytes"] for entry in manifest["files"].values())
            raise storage_error("publish a bundle to", versions, error, size_bytes) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def position(self, name: str, alias: str) -> AliasMove | None:
        """Where an alias stands; None where it was never set."""
        folder = self._alias_folder(name, alias)
        numbers = _numbers(folder, ".json")
        return _read_move(folder, numbers[-1]) if numbers else None

    def history(self, name: str, alias: str) -> list[AliasMove]:
        """All positions of an alias, oldest first."""
        folder = self._alias_folder(name, alias)
        return [_read_move(folder, number) for number in _numbers(folder, ".json")]

    def alias_names(self, name: str) -> list[str]:
        """Aliases that were ever set. Raises StorageError."""
        folder = self.folder / checked_name(name) / "aliases"
        return [alias for alias in _listed(folder) if NAME.fullmatch(alias)]

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version. Raises DataFormatError or StorageError where one cannot be read."""
        positions = {alias: self.position(name, alias) for alias in self.alias_names(name)}
        return {alias: move.version for alias, move in positions.items() if move}

    def move_alias(
        self, name: str, alias: str, version: int, *, reason: str, after: AliasMove | None
    ) -> bool:
        """Let an alias stand for a version; False where it is no longer at ``after``.

        ``after`` is the position that the decision was made from, so that of two movers that
        decided from the same one the second has to decide again. Raises InputError for a version
        that does not exist.
        """
        if version not in self.versions(name):
            raise InputError(f"{name} has no version {version}; it has {self.versions(name)}")
        folder = self._alias_folder(name, alias)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error("make the folder", folder, error) from error
        number = 1 if after is None else after.number + 1
        path = folder / f"{numbered(number)}.json"
        is_moved = create_json_durably(path, new_move(version, reason))
        if is_moved:
            self._require_still_there(name, alias, version)
        return is_moved

    def _require_still_there(self, name: str, alias: str, version: int) -> None:
        """Whoever prunes looks at the aliases after a version is out of sight, we look at it now.

        So one of the two sees the other. Raises InputError where the version was pruned.
        """
        if version not in self.versions(name):
            raise InputError(
                f"{name}@{version} was pruned in this moment, and {alias} stands for it: let "
                f"{alias} stand for another version"
            )

    def point_alias(self, name: str, alias: str, version: int, reason: str) -> None:
        """Let an alias stand for a version, wherever it stands now; no move where it does already.

        Raises InputError where there is no such version, BundleError where it is altered.
        """
        if version in self.versions(name):
            _verified(self.bundle(name, version))
        while True:  # again where it moved between the look and the move
            position = self.position(name, alias)
            is_there = position is not None and position.version == version
            if is_there or self.move_alias(name, alias, version, reason=reason, after=position):
                return

    def resolve(self, reference: BundleReference) -> int:
        """The version that a reference means. Raises InputError that lists what there is."""
        versions = self.versions(reference.name)
        if not versions:
            known = ", ".join(self.names()) or "none"
            raise InputError(
                f"{self} has no bundle {reference.name!r}; it has: {known}"
            )  # fmt: skip
        if reference.alias is not None:
            aliases = self.aliases(reference.name)
            if reference.alias not in aliases:
                raise InputError(
                    f"{reference.name} has no alias {reference.alias!r}; it has aliases {aliases} "
                    f"and versions {versions}"
                )
            return aliases[reference.alias]
        assert reference.version is not None
        if reference.version not in versions:
            raise InputError(
                f"{reference.name} has no version {reference.version}; it has {versions}"
            )
        return reference.version

    def _publishable(self, source: Path) -> tuple[dict[str, Any], str, int | None]:
        """The manifest of what is to be published, its name, and the version that it has already.

        Raises BundleError where it does not verify.
        """
        manifest = _verified(source)
        FolderSource(source).refuse_additions(manifest)  # a partial pull verifies, too
        name = checked_name(manifest["name"])
        for version in self.versions(name):
            with suppress(BundleError):  # an odd version is no fault of this one
                if _lasting(self.manifest(name, version)) == _lasting(manifest):
                    return manifest, name, version
        return manifest, name, None

    def _move_into_place(self, name: str, staging: Path) -> int:
        for _ in range(MAX_ATTEMPTS):
            version = max(self.versions(name), default=0) + 1
            target = self.bundle(name, version)
            try:
                # A folder is never renamed onto one with content: another publisher was first.
                os.rename(staging, target)  # noqa: PTH104 - its error is the point
            except OSError:
                if not target.exists():
                    raise
                continue
            sync_folder(target.parent)
            return version
        raise BundleError(f"{MAX_ATTEMPTS} others published {name} at the same time; try again")

    def _alias_folder(self, name: str, alias: str) -> Path:
        return self.folder / checked_name(name) / "aliases" / checked_name(alias)


def new_move(version: int, reason: str) -> dict[str, Json]:
    """What is written of a move that happens now."""
    return {
        "moved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "reason": reason,
        "version": version,
    }


def checked_name(name: str) -> str:
    """The name, if it can be a bundle's or an alias's. Raises InputError."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is no name of a bundle or alias; expected letters, digits, '.', '_', '-', "
            "at most 128 of them, beginning with a letter or digit"
        )
    return name


def numbered(number: int) -> str:
    """The name of a version's folder, or of the file of an alias's position."""
    return f"{number:0{VERSION_DIGITS}d}"


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise storage_error("list", folder, error) from error


def _numbers(folder: Path, suffix: str = "") -> list[int]:
    """Numbers that name a version or a position of an alias, ascending."""
    found = [
        NUMBER.fullmatch(name.removesuffix(suffix))
        for name in _listed(folder)
        if name.endswith(suffix)
    ]
    numbers = sorted(int(name[0]) for name in found if name is not None)
    return [number for number in numbers if number > 0]


def parse_move(value: Json, number: int, path: Path | str) -> AliasMove:
    """The move that was read from ``path``. Raises DataFormatError."""
    content = required_fields(value, path, MOVE)
    if content["version"] < 1 or content.keys() != MOVE.keys():
        raise DataFormatError(f"{path} names version {content['version']!r:.40}")
    return AliasMove(number=number, **content)


def _read_move(folder: Path, number: int) -> AliasMove:
    path = folder / f"{numbered(number)}.json"
    try:
        return parse_move(read_json(path), number, path)
    except FileNotFoundError as error:
        raise StorageError(f"{path} was taken away while it was read; try again") from error
    except DataFormatError as error:
        raise DataFormatError(
            f"{path} is no position of an alias ({error}); move it away: the one before it holds "
            "then"
        ) from error


def _require_own(folder: Path) -> None:
    """Raise StorageError for a link: nothing is written or deleted behind one."""
    if folder.is_symlink() or folder.parent.is_symlink():
        raise StorageError(f"{folder} is a link, expected a folder of the registry's own")


def _copy_tree(source: Path, staging: Path) -> None:
    try:
        shutil.copytree(source, staging)
    except shutil.Error as error:  # a list of (from, to, words)
        words = "; ".join(sorted({str(one[2]) for one in error.args[0]}))
        full = next((n for n in FULL_ERRNOS if os.strerror(n) in words), errno.EIO)
        raise OSError(full, words) from error


def _lasting(manifest: dict[str, Any]) -> dict[str, Any]:
    """What is the same whenever and however fast the same champion is exported."""
    passing = ("measured", "manifest_digest")
    return {name: value for name, value in manifest.items() if name not in passing}


def _verified(folder: Path) -> dict[str, Any]:
    try:
        return consumer.verify_files(folder)
    except consumer.RefusedBundleError as error:
        raise BundleError(str(error)) from error


def _clear_abandoned(versions: Path) -> None:
    """Delete what publishers left that were killed long ago; they alone make such names."""
    for path in versions.iterdir():
        with suppress(FileNotFoundError):
            is_old = time.time() - path.lstat().st_mtime > ABANDONED_S
            if PARTIAL.fullmatch(path.name) and is_old:
                shutil.rmtree(path, ignore_errors=True)  # which refuses a link


def _sync_tree(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
