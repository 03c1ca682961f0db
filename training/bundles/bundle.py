"""The bundle: everything another team needs, in one folder that proves itself."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from holdfast.training.bundles import consumer
from holdfast.training.bundles.model_card import model_card
from holdfast.training.checkpointing.storage import exchange
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import BundleError
from holdfast.training.export.formats import formats
from holdfast.training.export.parts import FOLDER, artifact_path, part_formats
from holdfast.training.export.serving import mlflow_model, triton_config
from holdfast.training.export.specification import Interface
from holdfast.training.runs.durable_json import allowed_mode, json_bytes, sync_folder

FILE_MODE = 0o666  # safetensors writes 0600, which nobody else could read; the umask decides
FOLDER_MODE = 0o777
PYTHON_VERSION = "3.11"
MARKS = (consumer.MANIFEST, "verify.py")
"""By one of these a damaged bundle is still known as one."""


@dataclass(frozen=True)
class BundleFacts:
    """What is written about the champion and its run. Nothing of it depends on the clock.

    Attributes:
        parts: interface of each part of a model that is served as several graphs.
        champion: name, digest of the weights, validation and test metrics.
        parity: content of ``parity.json``.
        unused: floating-point tensors that no output depends on, for the model card.
        measured: figures that differ from one making to the next: times, latencies.
    """

    name: str
    run_id: str
    config: Mapping[str, Any]
    config_digest: str
    data_fingerprint: str
    versions: Mapping[str, str]
    licence: str
    description: str
    task: str
    interface: Interface
    parts: Mapping[str, Interface]
    max_batch_size: int
    champion: Mapping[str, Any]
    formats: tuple[str, ...]
    parity: Mapping[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def complete_bundle(folder: Path, facts: BundleFacts, scratch: Path) -> dict[str, Any]:
    """Add to the artifacts in ``folder`` all that makes them a bundle; the manifest goes last.

    The golden samples of the model and of its parts, and the ranges, are in ``scratch``.
    After return every file is durable, readable by others, and verified against the manifest.
    Raises BundleError if it does not verify.
    """
    for place in ("", *(f"{FOLDER}/{part}" for part in facts.parts)):
        shutil.copytree(scratch / place / "golden", folder / place / "golden", dirs_exist_ok=True)
    shutil.copyfile(scratch / consumer.RANGES, folder / consumer.RANGES)
    shutil.copyfile(Path(consumer.__file__), folder / "verify.py")
    if "onnx" in facts.formats:  # what serves it
        (folder / "config.pbtxt").write_text(triton_config(facts.interface, facts.max_batch_size))
        mlmodel = mlflow_model(facts.interface, dict(facts.versions), PYTHON_VERSION)
        (folder / "1/MLmodel").write_text(mlmodel)
    (folder / "parity.json").write_bytes(json_bytes(dict(facts.parity)))
    manifest = _facts_json(folder, facts)
    card = model_card(manifest, facts.parity, facts.task, facts.unused)
    (folder / "README.md").write_text(card)
    files: dict[str, Any] = _describe_files(folder)
    manifest["files"] = files
    manifest["content_digest"] = hashlib.sha256(consumer.canonical_bytes(files)).hexdigest()
    manifest["manifest_digest"] = consumer.manifest_digest(manifest)
    (folder / consumer.MANIFEST).write_bytes(consumer.canonical_bytes(manifest))
    _make_durable_and_readable(folder)
    return verified(folder)


def verified(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files are all right. Raises BundleError."""
    try:
        return consumer.verify_files(folder)
    except consumer.RefusedBundleError as error:
        raise BundleError(str(error)) from error


def publish(staging: Path, target: Path) -> None:
    """Move a complete bundle into place at one stroke. An older one is deleted afterwards.

    Raises BundleError where something stands there that is no bundle.
    """
    require_replaceable(target)
    if target.exists():
        exchange(staging, target)
    else:
        staging.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(staging, ignore_errors=True)


def require_replaceable(target: Path) -> None:
    """Raise BundleError where a bundle cannot be put without deleting what is none."""
    if not (target.exists() or target.is_symlink()):
        return
    is_folder = target.is_dir() and not target.is_symlink()
    if not is_folder or not (
        any((target / n).is_file() for n in MARKS) or not any(target.iterdir())
    ):
        raise BundleError(
            f"{target} is not a bundle, and putting one there would delete it: move it away"
        )


def without_paths(value: Any) -> Any:
    """A copy in which absolute paths are replaced by their last part."""
    if isinstance(value, Mapping):
        return {str(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if isinstance(value, PurePath) or (isinstance(value, str) and value.startswith(("/", "~"))):
        return PurePath(value).name
    return value


def _facts_json(folder: Path, facts: BundleFacts) -> dict[str, Any]:
    table = formats()
    return {
        "champion": dict(facts.champion),
        "config": without_paths(facts.config),
        "config_digest": facts.config_digest,
        "data_fingerprint": facts.data_fingerprint,
        "description": facts.description,
        "format_version": consumer.FORMAT_VERSION,
        "formats": _formats_json(folder, {name: table[name].path for name in facts.formats}),
        "interface": facts.interface.as_json(),
        "licence": facts.licence,
        "max_batch_size": facts.max_batch_size,
        "measured": dict(facts.measured),
        "name": facts.name,
        "parts": {
            part: {
                "formats": _formats_json(
                    folder,
                    {name: artifact_path(part, name) for name in part_formats(facts.formats)},
                ),
                "interface": interface.as_json(),
            }
            for part, interface in facts.parts.items()
        },
        "run": {"experiment": facts.name, "run_id": facts.run_id},
        "versions": dict(facts.versions),
    }


def _formats_json(folder: Path, paths: Mapping[str, str]) -> dict[str, Json]:
    return {
        name: {
            "is_exact": formats()[name].is_exact,
            "path": path,
            "size_bytes": (folder / path).stat().st_size,
        }
        for name, path in paths.items()
    }


def _describe_files(folder: Path) -> dict[str, Json]:
    described: dict[str, Json] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            described[path.relative_to(folder).as_posix()] = {
                "sha256": consumer.file_digest(path),
                "size_bytes": path.stat().st_size,
            }
    return described


def _make_durable_and_readable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(allowed_mode(FOLDER_MODE if path.is_dir() else FILE_MODE))
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
