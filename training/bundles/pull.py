"""Copy a bundle out of a registry: every byte digested on the way, nothing in place until all is.

    <target>.partial/holdfast-pull     says that the folder is a pull's own
    <target>.partial/bundle/           what is there so far; it becomes <target> by one rename

Only a folder that is a pull's own is written to or deleted from; no link is followed.

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
from holdfast.training.runs.durable_json import (
    allowed_mode,
    storage_error,
    sync_folder,
    write_json_durably,
)
from holdfast.training.runs.shown_text import shown

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import Json

Progress = Callable[[str, int], None]
"""Called with a file's name and its size as soon as the file is right."""
MARK = "holdfast-pull"
CONTENT = "bundle"


def pull(
    source: BundleSource,
    target: Path,
    only: tuple[str, ...] = (),
    progress: Progress = lambda _name, _size: None,
    name: str | None = None,
) -> dict[str, Any]:
    """Copy the bundle ``source`` to ``target``; the manifest.

    What an interrupted pull left in ``<target>.partial`` is used: files that are right are not
    copied again, a half file is gone on with. After return the bundle is in place and verified;
    before that there is no ``target``. A ``target`` that is this bundle already is left alone.

    Args:
        source: where the bundle is.
        target: where it is to be.
        only: these formats alone; all where there is none.
        progress: told each file that is right.
        name: that the bundle must have.

    Raises:
        BundleError: a byte differs from the manifest, or there is something that the manifest does
            not name, a link, or a path that would leave the folder, or the bundle has another
            name; the message names it.
        InputError: ``target`` is neither missing, empty nor this bundle, ``<target>.partial`` is
            not a pull's, or ``only`` names no format.
        StorageError: the source cannot be read now, or the target cannot be written.
    """
    target = _absolute(target)
    manifest = source.manifest()
    if name is not None and manifest["name"] != name:
        raise BundleError(
            f"{source} holds a bundle of the name {manifest['name']!r}, not {name!r}; nothing was "
            "copied"
        )
    _check_only(manifest, only)
    partial = target.with_name(f"{target.name}.partial")
    try:
        if (target.exists() or target.is_symlink()) and not _is_empty_folder(target):
            return _already_there(manifest, target, only)
        source.refuse_additions(manifest)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _own_folder(partial):
            _fill(source, partial / CONTENT, manifest, only, progress)
            (partial / CONTENT).rename(target)
            sync_folder(target.parent)
            (partial / MARK).unlink()
            partial.rmdir()
    except HoldfastError:
        raise
    except OSError as error:
        raise storage_error("write", partial, error) from error
    return manifest


def _absolute(target: Path) -> Path:
    """The same place by its own name. Raises InputError where it cannot be a new folder's."""
    try:
        found = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a link
        is_here = found == Path.cwd() or found in Path.cwd().parents
        os.fsencode(found)
    except (OSError, ValueError) as error:
        raise InputError(f"{target} cannot be a folder's name: {error}") from error
    if is_here or "\0" in str(found):
        raise InputError(
            f"{target} is no folder that a bundle could become; name a new one, as in --to my-model"
        )
    return found


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _fill(
    source: BundleSource,
    content: Path,
    manifest: Mapping[str, Any],
    only: tuple[str, ...],
    progress: Progress,
) -> None:
    """Copy what is missing; after return ``content`` is the bundle, verified."""
    wanted = consumer.chosen_files(manifest, list(only)) if only else manifest["files"]
    if content.is_symlink() or (content.exists() and not content.is_dir()):
        content.unlink()
    content.mkdir(exist_ok=True)
    _remove_strangers(content, wanted)
    for name, entry in sorted(wanted.items()):
        _copy_file(source, content, name, entry)
        progress(name, entry["size_bytes"])
    if only:
        chosen: list[Json] = [*sorted(only)]
        write_json_durably(content / consumer.PULLED, {"only": chosen})
    (content / consumer.MANIFEST).write_bytes(consumer.canonical_bytes(manifest))
    _verify(content)
    for path in (content, *content.rglob("*")):
        path.chmod(allowed_mode(0o777 if path.is_dir() else 0o666))


@contextmanager
def _own_folder(partial: Path) -> Iterator[None]:
    """Make the folder, or take the one that a pull has left; nobody else has it meanwhile.

    Raises InputError where it is somebody else's, or another pull writes it.
    """
    with suppress(FileExistsError):
        partial.mkdir()
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(partial, flags)
    except OSError as error:
        raise InputError(_not_own(partial)) from error
    try:
        with suppress(OSError):  # some network file systems lock no folders; digests still hold
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another pull writes {partial} now; wait for it") from None
        _require_mark(partial)
        yield
    finally:
        os.close(descriptor)


def _require_mark(partial: Path) -> None:
    """Mark an empty folder as a pull's; raise InputError for one that has no mark."""
    mark = partial / MARK
    if not any(partial.iterdir()):
        mark.touch(exist_ok=False)
    try:
        is_own = stat.S_ISREG(mark.lstat().st_mode)
    except FileNotFoundError:
        is_own = False
    if not is_own:
        raise InputError(_not_own(partial))


def _not_own(partial: Path) -> str:
    return (
        f"{partial} is not what holdfast pull leaves when it is interrupted, and nothing in it is "
        f"touched: move it away, or name another folder with --to"
    )


def _check_only(manifest: Mapping[str, Any], only: tuple[str, ...]) -> None:
    unknown = sorted(set(only) - set(manifest["formats"]))
    if unknown:
        raise InputError(
            f"the bundle has no format {unknown[0]!r}; it has "
            f"{shown(', '.join(manifest['formats']))}"
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


def _remove_strangers(content: Path, wanted: Mapping[str, Any]) -> None:
    """Delete what an earlier pull of something else left, and everything that is no plain file.

    A file with a second name is no file of a pull: its bytes are somebody else's, too.
    """
    for name, path, mode in reversed(consumer.entries(content)):
        if stat.S_ISDIR(mode):
            if not any(file.startswith(f"{name}/") for file in wanted):
                shutil.rmtree(path)
        elif not stat.S_ISREG(mode) or name not in wanted or path.lstat().st_nlink > 1:
            path.unlink()


def _copy_file(source: BundleSource, content: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Copy what is not there yet; where the result is wrong, once more from the beginning."""
    target = content / name
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
