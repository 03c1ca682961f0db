"""A fork: a new run that begins with the full state of a checkpoint of another run.

The new run's folder is made beside the others under a hidden name, and renamed once all of it is
durable and verified: it is wholly there or not at all. The checkpoint's tensors and state are
copied byte for byte; its manifest says that it is the new run's. Seeds are the other run's, so a
fork without changed keys ends with the bytes that the other run ends with. Of changed keys,
arguments of the optimizer take effect where the fork begins; with another rate, scheduler or
warm-up, the schedule begins anew there.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.training.beginnings.choosing import chosen_checkpoint, read_checkpoint, require_full
from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.manifest import MANIFEST_NAME, Manifest
from holdfast.training.configuration.loading import config_digest, digested_values
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import (
    CheckpointCorruptError,
    ConfigError,
    RunConflictError,
)
from holdfast.training.exactness.seeding import derive_seed
from holdfast.training.exactness.surroundings import surroundings
from holdfast.training.exactness.versions import library_versions
from holdfast.training.experiment.building import build_experiment
from holdfast.training.experiment.loading import source_digest, source_file
from holdfast.training.experiment.protocol import Experiment
from holdfast.training.runs.directory import (
    Lineage,
    RunDirectory,
    RunRecord,
    read_run_record,
    run_identity,
    utc_now,
    validate_run_id,
)
from holdfast.training.runs.durable_json import storage_error, sync_folder, write_json_durably
from holdfast.training.stage import (
    StageArguments,
    data_fingerprint,
    resolve_arguments,
    with_absolute_paths,
)
from holdfast.training.tiers.scratch import told_path
from holdfast.training.weights.identity import weight_files

STATE_OF = ("optimizer.name", "ema.decays", "ema.posthoc_gammas")
"""Whose state a fork takes over, which fits nothing else."""
HIDDEN = ".fork-"


@dataclass(frozen=True)
class Fork:
    """A new run, ready to be resumed."""

    run: RunDirectory
    record: RunRecord
    num_bytes: int


def fork(
    arguments: StageArguments,
    at: str,
    new_id: str,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
    into: Path | None = None,
) -> Fork:
    """Make a run that begins with a checkpoint of another one.

    Args:
        arguments: of the other run, with the overrides and the file of the new one.
        at: a step, ``best`` or ``latest``.
        new_id: of the new run.
        on_bytes: told how many bytes of how many are copied.
        into: store of the new run; that of the other one, unless it is given.

    Raises:
        InputError: there is no such run or checkpoint, it holds weights alone, the new run is
            there already, or a key was changed that the state would not follow.
        CheckpointCorruptError: the checkpoint was changed. Nothing is left then.
        StorageError: the store cannot be written. Nothing is left then.
    """
    parent = arguments.run
    store = arguments.store if into is None else into
    child = RunDirectory(store / parent.path.parent.name / validate_run_id(new_id))
    if os.path.lexists(child.path):
        raise RunConflictError(
            f"{told_path(child.path)} is there already: take another id for the fork"
        )
    config, experiment_class = resolve_arguments(replace(arguments, is_resume=True))
    there = read_run_record(parent)
    manifest = chosen_checkpoint(parent, at, config)
    require_full(parent, manifest)
    read_checkpoint(parent.checkpoint(manifest.step))
    changed = dict(_changed(there.config, config.model_dump(mode="json")))
    _require_state_fits(changed)
    record = there.model_copy(
        update={
            "run_id": new_id,
            "config": config.model_dump(mode="json"),
            "config_digest": config_digest(config),
            "versions": library_versions(),
            "experiment_digest": source_digest(experiment_class),
            "surroundings": surroundings(source_file(experiment_class)),
            "created_at": utc_now(),
            "lineage": Lineage(
                run=run_identity(there),
                run_id=there.run_id,
                step=manifest.step,
                manifest_digest=digest_of([manifest.to_bytes()]),
                changed=changed,
            ),
            **(_data_of(arguments, there, config, experiment_class) if changed else {}),
        }
    )
    num_bytes = _write(parent, child, manifest, record, config, on_bytes)
    return Fork(child, record, num_bytes)


def _data_of(
    arguments: StageArguments,
    there: RunRecord,
    config: RunConfig,
    experiment_class: type[Experiment],
) -> dict[str, Any]:
    """Seeds, data and weights of a changed configuration, which may name others."""
    seeds = there.seeds
    if config.seed != there.config.get("seed"):
        seeds = {purpose: derive_seed(config.seed, purpose) for purpose in seeds}
    located = with_absolute_paths(config, arguments.folder, there.folder)
    experiment = build_experiment(experiment_class, located, seeds)
    return {
        "seeds": seeds,
        "data_fingerprint": data_fingerprint(experiment),
        "weight_files": weight_files(experiment, located.train),
    }


def _changed(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value here) of each leaf that differs."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in sorted(there.keys() | here.keys()):
            yield from _changed(there.get(name), here.get(name), f"{key}.{name}" if key else name)
    elif there != here:
        yield key, here


def _require_state_fits(changed: Mapping[str, Any]) -> None:
    for key in changed:
        if any(key == name or key.startswith(f"{name}.") for name in STATE_OF):
            raise ConfigError(
                f"{key} cannot change in a fork, which goes on with the state of the checkpoint: "
                f"begin a new run with that, and with the checkpoint as train.initial_weights"
            )


def _write(
    parent: RunDirectory,
    child: RunDirectory,
    manifest: Manifest,
    record: RunRecord,
    config: RunConfig,
    on_bytes: Callable[[int, int], None],
) -> int:
    hidden = RunDirectory(child.path.with_name(f"{HIDDEN}{child.path.name}-{secrets.token_hex(6)}"))
    own = manifest.model_copy(
        update={
            "config_digest": record.config_digest,
            "config": digested_values(config),
            "run": run_identity(record),
        }
    )
    try:
        target = hidden.checkpoint(manifest.step)
        target.mkdir(parents=True)
        num_bytes = _copy(parent.checkpoint(manifest.step), target, manifest, on_bytes)
        _write_durably(target / MANIFEST_NAME, own.to_bytes())
        for folder in (target, hidden.checkpoints):
            sync_folder(folder)
        write_json_durably(hidden.run_json, record.model_dump(mode="json"))
        hidden.path.rename(child.path)
        sync_folder(child.path.parent)
    except OSError as error:
        raise storage_error("write", child.path, error) from error
    finally:
        shutil.rmtree(hidden.path, ignore_errors=True)
    return num_bytes


def _copy(
    source: Path, target: Path, manifest: Manifest, on_bytes: Callable[[int, int], None]
) -> int:
    """Copy what a manifest lists; the copies are read back, and must have its digests."""
    total, num_done = sum(entry.size_bytes for entry in manifest.files.values()), 0
    for name, entry in sorted(manifest.files.items()):
        algorithm = entry.digest.partition(":")[0]
        content, digest = read_file(source / name, algorithm, entry.size_bytes)
        if digest == entry.digest:
            _write_durably(target / name, content.numpy().data)
            _, digest = read_file(
                target / name, algorithm, entry.size_bytes, on_bytes=lambda _: None
            )
        if digest != entry.digest:
            raise CheckpointCorruptError(
                f"{source / name} was changed: the manifest says its digest is {entry.digest}, "
                f"found {digest}"
            )
        num_done += entry.size_bytes
        on_bytes(num_done, total)
    return total


def _write_durably(path: Path, content: bytes | memoryview) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
