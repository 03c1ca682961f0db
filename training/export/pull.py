"""Copy a bundle out of a registry: every byte digested on the way, nothing in place until all is.

Imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.durable_json import write_json_durably
from training.errors import BundleError, InputError
from training.export import consumer

if TYPE_CHECKING:
    from training.config import Json

CHUNK_BYTES = 1 << 20
Progress = Callable[[str, int], None]
"""Called with a file's name and its size as soon as the file is right."""


def pull(
    source: Path,
    target: Path,
    only: tuple[str, ...] = (),
    progress: Progress = lambda _name, _size: None,
) -> dict[str, Any]:
    """Copy the bundle ``source`` to ``target``; the manifest.

    What an interrupted pull left in ``<target>.partial`` is used: files that are right are not
    copied again, a half file is gone on with. After return the bundle is in place and verified;
    before that there is no ``target``. A ``target`` that is this bundle already is left alone.

    Raises:
        BundleError: a byte differs from the manifest, or there is something that the manifest does
            not name, a link, or a path that would leave the folder; the message names it.
        InputError: ``target`` exists and is something else, or ``only`` names no format.
    """
    manifest = _manifest(source)
    _check_only(manifest, only)
    if target.exists() or target.is_symlink():
        return _already_there(manifest, target, only)
    _refuse_additions(source, manifest)
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    wanted = consumer.chosen_files(manifest, list(only)) if only else manifest["files"]
    _remove_strangers(partial, wanted)
    for name, entry in sorted(wanted.items()):
        _copy_file(source, partial, name, entry)
        progress(name, entry["size_bytes"])
    if only:
        chosen: list[Json] = [*sorted(only)]
        write_json_durably(partial / consumer.PULLED, {"only": chosen})
    content = consumer.canonical_bytes(manifest)
    (partial / consumer.MANIFEST).write_bytes(content)
    _verify(partial)
    for path in (partial, *partial.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    partial.rename(target)
    return manifest


def _manifest(source: Path) -> dict[str, Any]:
    try:
        return consumer.read_manifest(source)
    except consumer.RefusedBundleError as error:
        raise BundleError(f"{source}: {error}") from error


def _check_only(manifest: Mapping[str, Any], only: tuple[str, ...]) -> None:
    unknown = sorted(set(only) - set(manifest["formats"]))
    if unknown:
        raise InputError(
            f"the bundle has no format {unknown[0]!r}; it has {', '.join(manifest['formats'])}"
        )


def _already_there(
    manifest: Mapping[str, Any], target: Path, only: tuple[str, ...]
) -> dict[str, Any]:
    try:
        there = consumer.verify_files(target)
    except (consumer.RefusedBundleError, OSError) as error:
        raise InputError(
            f"{target} exists and is not a good bundle ({error}); move it away or choose another "
            "folder"
        ) from error
    wanted = consumer.chosen_files(manifest, list(only)) if only else manifest["files"]
    is_same = there["manifest_digest"] == manifest["manifest_digest"]
    if not is_same or not set(wanted) <= set(consumer.wanted_files(target, there)):
        raise InputError(
            f"{target} holds another bundle, or fewer of its formats; choose another folder"
        )
    return there


def _refuse_additions(source: Path, manifest: Mapping[str, Any]) -> None:
    for path in sorted(source.rglob("*")):
        name, mode = path.relative_to(source).as_posix(), path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise BundleError(f"{source}: {name} is a symlink or special file; pull refuses it")
        if stat.S_ISREG(mode) and name not in manifest["files"] and name != consumer.MANIFEST:
            raise BundleError(f"{source}: {name} is not in the manifest; it was added")


def _remove_strangers(partial: Path, wanted: Mapping[str, Any]) -> None:
    """Delete what an earlier pull of something else left, and everything that is no plain file."""
    for path in sorted(partial.rglob("*"), reverse=True):
        name, mode = path.relative_to(partial).as_posix(), path.lstat().st_mode
        if stat.S_ISDIR(mode):
            if not any(file.startswith(f"{name}/") for file in wanted):
                shutil.rmtree(path)
        elif not stat.S_ISREG(mode) or name not in wanted:
            path.unlink()


def _copy_file(source: Path, partial: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Copy what is not there yet; where the result is wrong, once more from the beginning."""
    target = partial / name
    target.parent.mkdir(parents=True, exist_ok=True)
    had_bytes = target.exists()
    found = _append(source / name, target, entry["size_bytes"])
    if found != entry["sha256"] and had_bytes:
        target.unlink()
        found = _append(source / name, target, entry["size_bytes"])
    if found != entry["sha256"]:
        target.unlink()
        raise BundleError(
            f"{source}: {name} was altered: sha256 {found[:12]}…, the manifest says "
            f"{entry['sha256'][:12]}…; nothing was put in place"
        )


def _append(source: Path, target: Path, size_bytes: int) -> str:
    """Digest of ``target`` after the missing bytes were copied to its end."""
    digest = hashlib.sha256()
    with target.open("a+b") as written:
        written.seek(0)
        while chunk := written.read(CHUNK_BYTES):
            digest.update(chunk)
        start = written.tell()
        if start > size_bytes:
            return "too long"
        with os.fdopen(_open_without_links(source), "rb") as stream:
            stream.seek(start)
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _open_without_links(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; the manifest names it") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


def _verify(folder: Path) -> None:
    try:
        consumer.verify_files(folder)
    except consumer.RefusedBundleError as error:
        raise BundleError(str(error)) from error
