"""What can be checked before anything starts, without torch and without Prefect."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from pydantic import ConfigDict

from holdfast.tasks.job import Job, require_code
from holdfast.training.configuration.loading import resolve_config
from holdfast.training.configuration.schema import RunConfig, Section
from holdfast.training.errors import (
    DataNotFoundError,
    InputError,
    StorageError,
    StorageFullError,
)
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.runs.directory import read_run_record, validate_run_id
from holdfast.training.runs.durable_json import FULL_ERRNOS
from holdfast.training.runs.paths import checked_store
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.probe import require_fit
from holdfast.training.tiers.scratch import address_of, parsed_store, tier_folder, told_path
from holdfast.training.tiers.viewing import viewed

MIN_FREE_BYTES = 64 * 2**20


class AnySettings(Section):
    """Settings of an experiment whose class is not loaded here; its own process checks them."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="allow")


def check_job(job: Job) -> RunConfig:
    """The configuration of a job that can be started, as far as this can be told from outside.

    The experiment's own settings are checked by the process that loads it.

    Raises:
        InputError: run id, experiment, configuration or data folder.
        StorageError: the store is not writable, or full.
    """
    validate_run_id(job.run_id)
    experiment_name(job.experiment)
    require_code(job)
    if job.is_script and job.config_file is not None:
        raise InputError(
            f"{job.config_file}: a script has its settings in holdfast.run(settings=…); leave "
            f"--config out, and say what differs with --set"
        )
    config = resolve_config(
        settings_class=AnySettings,
        defaults=_recorded_config(job) if job.is_resume else None,
        file=job.config_file,
        overrides=job.overrides,
    )
    folder = config.data.folder
    if folder is not None and not folder.expanduser().is_dir():
        raise DataNotFoundError(
            f"data.folder = {folder} is not a folder on this machine; "
            "mount it here, or name another with --set data.folder=/path"
        )
    require_writable(job.store)
    if (address := address_of(job.store)) is not None:
        require_fit(open_store(address), str(address))
    return config


def store_path(store: str) -> Path:
    """The absolute path of the folder that a store's URI or path names; runs are written there.

    Of a bucket it is a folder of this machine's scratch disk, see ``tiers/scratch.py``.

    Raises:
        InputError: the address is none, or what it names is no folder.
        StorageError: the scratch folder cannot be made.
    """
    parts = urlsplit(store) if store.startswith("file:") else None
    if parts is not None:
        return checked_store(Path(unquote(parts.path)).absolute())
    if (address := parsed_store(store)) is not None:
        return tier_folder(address, "work")
    return checked_store(Path(store).expanduser().absolute())


def require_writable(store: Path) -> None:
    """Make the store's folder, and write and remove a small file in it.

    Raises:
        StorageError: the folder cannot be made or written; the message says why.
        StorageFullError: less than 64 MiB are free.
    """
    _require_writable(store, "store", "name another with --store")


def _require_writable(folder: Path, name: str, advice: str) -> None:
    probe = folder / f".writable-{secrets.token_hex(6)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("xb") as file:  # "x": never through a link that somebody put there
                file.write(b"holdfast")
        finally:
            probe.unlink(missing_ok=True)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        if error.errno not in FULL_ERRNOS:
            raise StorageError(
                f"{name} {folder} is not writable: {error.strerror or error}; "
                f"{advice}, or correct its permissions"
            ) from error
        free_bytes = 0
    if free_bytes < MIN_FREE_BYTES:
        raise StorageFullError(
            f"{name} {folder} is full: {free_bytes:,} bytes are free, at least "
            f"{MIN_FREE_BYTES:,} are needed; make room, or {advice}",
            needed_bytes=MIN_FREE_BYTES,
            free_bytes=free_bytes,
        )


def require_prefect_home(home: Path) -> None:
    """Make sure that Prefect can keep its temporary server's database.

    Raises StorageError or StorageFullError. Prefect itself would try for minutes, and tell it then
    in the words of its database.
    """
    _require_writable(home, "Prefect's folder", "name another with PREFECT_HOME")


def _recorded_config(job: Job) -> dict[str, Any]:
    try:
        return read_run_record(viewed(job.run)).config
    except FileNotFoundError:
        raise InputError(f"there is no run to resume at {told_path(job.run.path)}") from None
