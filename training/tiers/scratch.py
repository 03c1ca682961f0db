"""Where the runs of a bucket lie on this machine: below the scratch folder, one folder a store.

    <scratch>/<digest of the address>/work/<experiment>/<run id>/    a run that is written here
    <scratch>/<digest of the address>/view/<experiment>/<run id>/    what was read of a run
    <scratch>/<digest of the address>/list/<experiment>/<run id>.json  what a list shows of it
    <scratch>/<digest of the address>/guest/<experiment>/<run id>/   a run of another machine that
                                                                     this one has joined
    <scratch>/<digest of the address>/registry/                      bundles that were read

Each of ``work``, ``view`` and ``guest`` looks like a store that is a folder, and holds a file that
names the address. Nothing that lies here is needed on another machine.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

from holdfast.training.errors import DataFormatError, InputError, StorageError
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import Limits, read_json, required_fields
from holdfast.training.storage.address import Address, is_address, parse_address

SCRATCH_VARIABLE = "HOLDFAST_SCRATCH"
MARKER = ".store-address.json"
LIMITS = Limits(max_bytes=2**14, max_depth=2)
ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "GOOGLE_BASE_URL",
)
Tier = Literal["work", "view", "guest"]


def scratch_folder() -> Path:
    """The folder that HOLDFAST_SCRATCH names; else one in the user's cache."""
    named = os.environ.get(SCRATCH_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "holdfast"


def store_folder(address: Address) -> Path:
    """What belongs to one store; the server is part of its name where one was named by hand."""
    server = next(filter(None, (os.environ.get(name) for name in ENDPOINTS)), "")
    digest = hashlib.sha256(f"{address}\n{server}".encode()).hexdigest()
    return scratch_folder() / digest[:16]


def tier_folder(address: Address, tier: Tier) -> Path:
    """The store's folder on this machine, made where it is missing. Raises StorageError."""
    folder = store_folder(address) / tier
    marker = folder / MARKER
    if not marker.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make the scratch folder {folder}: {error.strerror}; name another in "
                f"{SCRATCH_VARIABLE}"
            ) from error
        write_json_durably(marker, {"address": str(address)})
    return folder


def address_of(store: Path) -> Address | None:
    """The address of the store that a folder is a tier of; None for a folder that is a store.

    Only what lies below the scratch folder is one: a store of a stranger leads nowhere else.

    Raises DataFormatError or StorageError where that cannot be read.
    """
    if store.absolute().parent.parent != scratch_folder():
        return None
    path = store / MARKER
    try:
        told = required_fields(read_json(path, LIMITS), path, {"address": (str,)})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError as error:
        if isinstance(error, DataFormatError):
            raise
        return None
    return parse_address(told["address"])


def told_store(store: Path) -> str:
    """How a store is named to people and to other processes: its address, or its path."""
    address = address_of(store)
    return str(store) if address is None else str(address)


def told_path(path: Path) -> str:
    """How a file of a run is named to people: below the store's address, where it has one."""
    for folder in path.parents:
        if (address := address_of(folder)) is not None:
            return f"{address}/{path.relative_to(folder).as_posix()}"
    return str(path)


def run_name(run: RunDirectory) -> str:
    """``experiment/run_id``: what the keys of a run in a bucket are made of."""
    return f"{run.path.parent.name}/{run.path.name}"


def replica_folder(run: RunDirectory) -> Path:
    """What a machine keeps about its copy of a run, beside the runs."""
    return run.path.parent.parent / ".replica" / run.path.parent.name / run.path.name


def parsed_store(store: str) -> Address | None:
    """The address that names a store; None for a path. Raises InputError as ``parse_address``."""
    return parse_address(store) if is_address(store) else None
