"""A bundle that verifies; its model does not run, which registries and pulls do not ask for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from holdfast.training.bundles import consumer

CONTENT = {
    "1/model.onnx": b"onnx" * 1000,
    "README.md": b"# card\n",
    "golden/golden.json": b"{}\n",
    "model.safetensors": b"weights" * 5000,
}


def make_bundle(folder: Path, number: int = 0) -> Path:
    for name, content in CONTENT.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + bytes([number]))
    return seal(folder, number)


def seal(folder: Path, number: int = 0) -> Path:
    """Write a manifest that names the folder's files as they are."""
    files = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        for name, content in files_of(folder).items()
    }
    manifest: dict[str, Any] = {
        "champion": {"test_metrics": {"loss": 0.25 + number}},
        "files": files,
        "format_version": consumer.FORMAT_VERSION,
        "formats": {
            "onnx": {"path": "1/model.onnx"},
            "weights": {"path": "model.safetensors"},
        },
        "interface": {"class_names": {}, "inputs": [], "outputs": []},
        "name": "digits",
        "run": {"run_id": f"run-{number}"},
    }
    manifest["manifest_digest"] = consumer.manifest_digest(manifest)
    (folder / "manifest.json").write_bytes(consumer.canonical_bytes(manifest))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
