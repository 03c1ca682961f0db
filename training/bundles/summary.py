"""What a published bundle says about its artifacts, for reports and lists.

Imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.training.bundles import consumer
from holdfast.training.runs.stored_json import Kinds, read_json, required_fields

if TYPE_CHECKING:
    from holdfast.training.configuration.schema import Json

ARTIFACT: Kinds = {"format": (str,)}
PROMOTION: Kinds = {
    "name": (str,),
    "version": (int,),
    "alias": (str,),
    "is_promoted": (bool,),
    "reason": (str,),
}


def artifact_rows(bundle: Path) -> list[dict[str, Any]]:
    """One row per artifact: its row of ``parity.json``, and its ``latency`` by size of the batch.

    ``latency`` is ``{"batch-1": {"p50_ms", "p99_ms", "eager_p50_ms", "eager_p99_ms"}, …}``, where
    eager is PyTorch measured in turn with the artifact. Empty where there is no bundle.

    Raises DataFormatError or StorageError where a file is not readable.
    """
    try:
        parity = read_json(bundle / "parity.json")
        manifest = read_json(bundle / consumer.MANIFEST)
    except FileNotFoundError:
        return []
    artifacts = required_fields(parity, bundle / "parity.json", {"artifacts": (list,)})["artifacts"]
    place = bundle / consumer.MANIFEST
    measured = required_fields(manifest, place, {"measured": (dict,)})["measured"]
    latency = required_fields(measured, f"{place}: measured", {"latency": (dict,)})["latency"]
    rows = [required_fields(row, bundle / "parity.json", ARTIFACT) for row in artifacts]
    return [{**row, "latency": latency.get(row["format"], {})} for row in rows]


def promotion_fields(value: Json, path: Path) -> dict[str, Any]:
    """What ``promotion.json`` holds, checked. Raises DataFormatError that names file and field."""
    return required_fields(value, path, PROMOTION)


def published_name(promotion: Mapping[str, Any]) -> str:
    """``name@version`` in the registry, of what ``promotion.json`` holds."""
    return f"{promotion['name']}@{promotion['version']}"


def promotion_line(promotion: Mapping[str, Any]) -> str:
    """What became of a published bundle, in words."""
    verdict = "became" if promotion["is_promoted"] else "did not become"
    return f"{verdict} {promotion['alias']}: {promotion['reason']}"
