"""The registry of a store that is a bucket: the same, each version and each move one object.

    registry/<name>/versions/000003.json          names the files of a bundle, and is created once
    registry/<name>/aliases/<alias>/000007.json   the alias's seventh position, created once
    bundles/<name>/<random>/...                   the files; nobody sees them before a version does

Of several that create the same number at once one succeeds, and the others take the next.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.training.bundles import consumer
from holdfast.training.bundles.registry import (
    MAX_ATTEMPTS,
    NAME,
    NUMBER,
    REGISTRY,
    AliasMove,
    Registry,
    checked_name,
    new_move,
    numbered,
    parse_move,
)
from holdfast.training.bundles.sources import BundleSource
from holdfast.training.errors import (
    BundleError,
    DataFormatError,
    InputError,
    RunConflictError,
    StorageError,
)
from holdfast.training.runs.durable_json import storage_error
from holdfast.training.runs.shown_text import shown
from holdfast.training.runs.stored_json import parse_json
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import PART_BYTES, ObjectStore
from holdfast.training.tiers.head import read_head, run_folder
from holdfast.training.tiers.scratch import address_of, store_folder
from holdfast.training.tiers.transfer import download_file, read_tree, upload_file
from holdfast.training.tiers.tree import Tree, TreeFile, parse_tree

BUNDLES = "bundles"
OWN_BUNDLE = "bundle/"
"""Of a run: where its bundle lies in it."""


def open_registry(store: Path) -> Registry:
    """The registry of a store: of a folder, or of the bucket that the folder is a tier of."""
    address = address_of(store)
    return Registry(store) if address is None else BucketRegistry(address, open_store(address))


def run_bundle(address: Address, name: str) -> Path:
    """The bundle of a run in a bucket, read into a folder of this machine; nothing else is read.

    Args:
        address: of the store.
        name: ``experiment/run_id``.

    Raises InputError where there is no such run, or it has no bundle, or StorageError.
    """
    store = open_store(address)
    known = read_head(store, name)
    tree = None
    if known is not None and known[0].tree is not None and known[0].tree_digest is not None:
        tree = read_tree(store, known[0].tree, known[0].tree_digest, run_folder(name))
    files = {
        path.removeprefix(OWN_BUNDLE): file
        for path, file in (tree.files if tree is not None else {}).items()
        if path.startswith(OWN_BUNDLE)
    }
    if not files:
        what = "no run" if tree is None else "no bundle of the run"
        raise InputError(
            f"{address} has {what} {name}; holdfast status and bundles show what it has"
        )
    digest = hashlib.sha256(Tree(files).to_bytes()).hexdigest()
    folder = store_folder(address) / BUNDLES / name / digest[:16]
    if not folder.is_dir():
        _download(store, files, folder)
    return folder


def _download(store: ObjectStore, files: Mapping[str, TreeFile], folder: Path) -> None:
    """Make a folder of the files, as a whole or not at all. Raises StorageError."""
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        for path, file in files.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            download_file(store, file, partial / path)
        if not folder.is_dir():
            partial.rename(folder)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error("write", folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class BucketRegistry(Registry):
    """All bundles of a bucket. Versions that are read are kept below the scratch folder."""

    def __init__(self, address: Address, store: ObjectStore) -> None:
        super().__init__(store_folder(address))
        self._address, self._store = address, store

    def __str__(self) -> str:
        return f"{self._address}/{REGISTRY}"

    @property
    def told_store(self) -> str:
        """As ``Registry.told_store``."""
        return str(self._address)

    def names(self) -> list[str]:
        """As ``Registry.names``."""
        keys = [entry.key.split("/") for entry in self._store.list(REGISTRY)]
        return sorted(
            {
                parts[1]
                for parts in keys
                if len(parts) == 4 and parts[2] == "versions" and NAME.fullmatch(parts[1])
            }
        )

    def versions(self, name: str) -> list[int]:
        """As ``Registry.versions``."""
        return self._numbers(f"{REGISTRY}/{checked_name(name)}/versions")

    def bundle(self, name: str, version: int) -> Path:
        """The folder of a version on this machine, read from the bucket if it is not there yet."""
        folder = super().bundle(name, version)
        if folder.is_dir():
            return folder
        tree = self.tree(name, version)
        if tree is not None:
            _download(self._store, tree.files, folder)
        return folder

    def manifest(self, name: str, version: int) -> dict[str, Any]:
        """As ``Registry.manifest``; nothing else of the bundle is read."""
        return self.source(name, version).manifest()

    def source(self, name: str, version: int) -> BundleSource:
        """As ``Registry.source``."""
        tree = self.tree(name, version)
        if tree is None:
            raise InputError(f"{self} has no version {version} of {name}")
        return BucketSource(self._store, tree, f"{self}/{name}/versions/{numbered(version)}")

    def publish(self, source: Path) -> tuple[str, int]:
        """As ``Registry.publish``."""
        _, name, known = self._publishable(source)
        if known is not None:
            return name, known
        folder = f"{BUNDLES}/{name}/{secrets.token_hex(8)}"
        files = {}
        for path in sorted(source.rglob("*")):
            if path.is_file():
                place = path.relative_to(source).as_posix()
                files[place] = upload_file(self._store, path, f"{folder}/{place}")
        content = self._with_nonce(json.loads(Tree(files).to_bytes()))
        for _ in range(MAX_ATTEMPTS):
            version = max(self.versions(name), default=0) + 1
            if self._store.put(self._version_key(name, version), content, "absent") is not None:
                return name, version
        raise BundleError(f"{MAX_ATTEMPTS} others published {name} at the same time; try again")

    def position(self, name: str, alias: str) -> AliasMove | None:
        """As ``Registry.position``."""
        numbers = self._numbers(self._alias_key(name, alias))
        return self._move(name, alias, numbers[-1]) if numbers else None

    def history(self, name: str, alias: str) -> list[AliasMove]:
        """As ``Registry.history``."""
        numbers = self._numbers(self._alias_key(name, alias))
        return [self._move(name, alias, number) for number in numbers]

    def alias_names(self, name: str) -> list[str]:
        """As ``Registry.alias_names``."""
        listed = self._store.list(f"{REGISTRY}/{checked_name(name)}/aliases")
        keys = [entry.key.split("/") for entry in listed]
        return sorted({parts[3] for parts in keys if len(parts) == 5 and NAME.fullmatch(parts[3])})

    def move_alias(
        self, name: str, alias: str, version: int, *, reason: str, after: AliasMove | None
    ) -> bool:
        """As ``Registry.move_alias``."""
        versions = self.versions(name)
        if version not in versions:
            raise InputError(f"{name} has no version {version}; it has {versions}")
        number = 1 if after is None else after.number + 1
        key = f"{self._alias_key(name, alias)}/{numbered(number)}.json"
        content = self._with_nonce(new_move(version, reason))
        is_moved = self._store.put(key, content, "absent") is not None
        if is_moved:
            self._require_still_there(name, alias, version)
        return is_moved

    def tree(self, name: str, version: int) -> Tree | None:
        """The files of a version; None where there is no such version."""
        key = self._version_key(name, version)
        found = self._store.get(key)
        if found is None:
            return None
        return parse_tree(found.content, key, f"{BUNDLES}/{name}")

    def withdraw(self, name: str, version: int) -> None:
        """Take a version back that no alias stands for; its files stay.

        Raises RunConflictError where an alias has come to stand for it; then it is there.
        """
        key = self._version_key(name, version)
        found = self._store.get(key)
        self._store.delete([key])
        if version in self.aliases(name).values() and found is not None:
            self._store.put(key, found.content, "absent")
            raise RunConflictError(f"an alias has come to stand for {name}@{version}")

    def _move(self, name: str, alias: str, number: int) -> AliasMove:
        key = f"{self._alias_key(name, alias)}/{numbered(number)}.json"
        found = self._store.get(key)
        if found is None:
            raise StorageError(f"{key} was taken away while it was read; try again")
        value = parse_json(found.content, key)
        if not isinstance(value, dict):
            raise DataFormatError(f"{key} is no position of an alias; delete it")
        value.pop("nonce", None)
        return parse_move(value, number, key)

    def _numbers(self, folder: str) -> list[int]:
        found = [
            NUMBER.fullmatch(entry.key.removeprefix(f"{folder}/").removesuffix(".json"))
            for entry in self._store.list(folder)
        ]
        return sorted(int(name[0]) for name in found if name is not None and int(name[0]) > 0)

    def _version_key(self, name: str, version: int) -> str:
        return f"{REGISTRY}/{checked_name(name)}/versions/{numbered(version)}.json"

    def _alias_key(self, name: str, alias: str) -> str:
        return f"{REGISTRY}/{checked_name(name)}/aliases/{checked_name(alias)}"

    @staticmethod
    def _with_nonce(value: Mapping[str, Any]) -> bytes:
        """JSON that no other writer's can be equal to."""
        return json.dumps({**value, "nonce": secrets.token_hex(8)}, ensure_ascii=False).encode()


class BucketSource:
    """A bundle in a bucket, to be pulled."""

    def __init__(self, store: ObjectStore, tree: Tree, place: str) -> None:
        self._store, self._tree, self._place = store, tree, place

    def __str__(self) -> str:
        return self._place

    def manifest(self) -> dict[str, Any]:
        """The manifest, checked against its own digest. Raises BundleError."""
        content = b"".join(self.read(consumer.MANIFEST, 0, 0))
        try:
            return consumer.parse_manifest(content)
        except consumer.RefusedBundleError as error:
            raise BundleError(f"{self}: {error}") from error

    def refuse_additions(self, manifest: Mapping[str, Any]) -> None:
        """Files that the manifest does not name."""
        for name in self._tree.files:
            if name not in manifest["files"] and name != consumer.MANIFEST:
                raise BundleError(f"{self}: {shown(name)} is not in the manifest; it was added")

    def read(self, name: str, start: int, size_bytes: int) -> Iterator[bytes]:  # noqa: ARG002
        """Its bytes, a part at a time."""
        file = self._tree.files.get(name)
        if file is None:
            raise BundleError(f"{self}: {name} is missing; the manifest names it")
        if not file.key:
            yield file.inline[start:]
            return
        while start < file.size_bytes:
            end = min(start + PART_BYTES, file.size_bytes)
            yield self._part(file, start, end)
            start = end

    def _part(self, file: TreeFile, start: int, end: int) -> bytes:
        found = self._store.get(file.key, start, end)
        if found is None:
            raise BundleError(f"{self}: {file.key} is gone")
        return found.content
