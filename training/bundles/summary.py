"""What a published bundle says about its artifacts, for reports and lists.

Imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.training.bundles import consumer
from holdfast.training.runs.durable_json import read_json


def artifact_rows(bundle: Path) -> list[dict[str, Any]]:
    """One row per artifact: its row of ``parity.json``, and its ``latency`` by size of the batch.

    ``latency`` is ``{"batch-1": {"p50_ms", "p99_ms", "eager_p50_ms", "eager_p99_ms"}, …}``, where
    eager is PyTorch measured in turn with the artifact. Empty where there is no bundle.

    Raises DataFormatError or StorageError where a file is not readable.
    """
    try:
        parity: Any = read_json(bundle / "parity.json")
        manifest: Any = read_json(bundle / consumer.MANIFEST)
    except FileNotFoundError:
        return []
    latency = manifest["measured"]["latency"]
    return [{**row, "latency": latency.get(row["format"], {})} for row in parity["artifacts"]]


def published_name(promotion: Mapping[str, Any]) -> str:
    """``name@version`` in the registry, of what ``promotion.json`` holds."""
    return f"{promotion['name']}@{promotion['version']}"


def promotion_line(promotion: Mapping[str, Any]) -> str:
    """What became of a published bundle, in words."""
    verdict = "became" if promotion["is_promoted"] else "did not become"
    return f"{verdict} {promotion['alias']}: {promotion['reason']}"
