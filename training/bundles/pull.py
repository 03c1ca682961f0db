"""Copy a bundle out of a registry: every byte digested on the way, nothing in place until all is.

Imports the standard library alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.training.bundles import consumer
from holdfast.training.bundles.sources import CHUNK_BYTES, BundleSource
from holdfast.training.errors import BundleError, HoldfastError, InputError
from holdfast.training.runs.durable_json import storage_error, sync_folder, write_json_durably

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import Json

Progress = Callable[[str, int], None]
"""Called with a file's name and its size as soon as the file is right."""


def pull(
    source: BundleSource,
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
        InputError: ``target`` is neither missing, empty nor this bundle, or ``only`` names no
            format.
        StorageError: the source cannot be read now, or the target cannot be written.
    """
    manifest = source.manifest()
    _check_only(manifest, only)
    if (target.exists() or target.is_symlink()) and not _is_empty_folder(target):
        return _already_there(manifest, target, only)
    source.refuse_additions(manifest)
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _alone_in(partial):
            _fill(source, partial, manifest, only, progress)
            partial.rename(target)
        sync_folder(target.parent)
    except HoldfastError:
        raise
    except OSError as error:
        raise storage_error("write", partial, error) from error
    return manifest


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _fill(
    source: BundleSource,
    partial: Path,
    manifest: Mapping[str, Any],
    only: tuple[str, ...],
    progress: Progress,
) -> None:
    """Copy what is missing; after return ``partial`` is the bundle, verified."""
    wanted = consumer.chosen_files(manifest, list(only)) if only else manifest["files"]
    _remove_strangers(partial, wanted)
    for name, entry in sorted(wanted.items()):
        _copy_file(source, partial, name, entry)
        progress(name, entry["size_bytes"])
    if only:
        chosen: list[Json] = [*sorted(only)]
        write_json_durably(partial / consumer.PULLED, {"only": chosen})
    (partial / consumer.MANIFEST).write_bytes(consumer.canonical_bytes(manifest))
    _verify(partial)
    for path in (partial, *partial.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextmanager
def _alone_in(partial: Path) -> Iterator[None]:
    """Two pulls into one folder would write into each other's files. Raises InputError."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders; digests still hold
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another pull writes {partial} now; wait for it") from None
        yield
    finally:
        os.close(descriptor)


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


def _remove_strangers(partial: Path, wanted: Mapping[str, Any]) -> None:
    """Delete what an earlier pull of something else left, and everything that is no plain file."""
    for path in sorted(partial.rglob("*"), reverse=True):
        name, mode = path.relative_to(partial).as_posix(), path.lstat().st_mode
        if stat.S_ISDIR(mode):
            if not any(file.startswith(f"{name}/") for file in wanted):
                shutil.rmtree(path)
        elif not stat.S_ISREG(mode) or name not in wanted:
            path.unlink()


def _copy_file(source: BundleSource, partial: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Copy what is not there yet; where the result is wrong, once more from the beginning."""
    target = partial / name
    target.parent.mkdir(parents=True, exist_ok=True)
    had_bytes = target.exists()
    found = _append(source, name, target, entry["size_bytes"])
    if found != entry["sha256"] and had_bytes:
        target.unlink()
        found = _append(source, name, target, entry["size_bytes"])
    if found != entry["sha256"]:
        size_bytes = target.stat().st_size
        target.unlink()
        raise BundleError(
            f"{source}: {name} was altered: {size_bytes:,} bytes with sha256 {found[:12]}…, the "
            f"manifest says {entry['size_bytes']:,} with {entry['sha256'][:12]}…; nothing was put "
            "in place"
        )


def _append(source: BundleSource, name: str, target: Path, size_bytes: int) -> str:
    """Digest of ``target`` after the missing bytes were copied to its end; one too many at most."""
    digest = hashlib.sha256()
    with target.open("a+b") as written:
        written.seek(0)
        while chunk := written.read(CHUNK_BYTES):
            digest.update(chunk)
        position = written.tell()
        chunks = source.read(name, position, size_bytes) if position < size_bytes else ()
        for chunk in chunks:
            kept = chunk[: size_bytes + 1 - position]  # no more than shows that it is too long
            digest.update(kept)
            written.write(kept)
            position += len(kept)
            if position > size_bytes:
                break
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _verify(folder: Path) -> None:
    try:
        consumer.verify_files(folder)
    except consumer.RefusedBundleError as error:
        raise BundleError(str(error)) from error
