"""What reports read of a bundle."""

from __future__ import annotations

from pathlib import Path

from holdfast.training.bundles.summary import artifact_rows
from holdfast.training.reporting.page import page
from holdfast.training.runs.durable_json import write_json_durably
from tests.training.reporting.report_pages import full_facts


def test_a_row_has_parity_size_and_latency_of_an_artifact(tmp_path: Path) -> None:
    assert artifact_rows(tmp_path) == []
    latency = {"batch-1": {"p50_ms": 0.5}}
    rows = [{"format": "onnx", "size_bytes": 9}, {"format": "weights", "size_bytes": 8}]
    write_json_durably(tmp_path / "parity.json", {"artifacts": [*rows]})
    write_json_durably(tmp_path / "manifest.json", {"measured": {"latency": {"onnx": latency}}})
    assert artifact_rows(tmp_path) == [{**rows[0], "latency": latency}, {**rows[1], "latency": {}}]


def test_the_report_shows_latency_beside_that_of_eager_pytorch() -> None:
    content = page(full_facts())
    for shown in ("p50 (ms)", "Eager p99 (ms)", "0.061", "0.290"):
        assert shown in content
