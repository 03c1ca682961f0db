"""A gate that cannot fail is no gate: every seeded fault must be caught, and it is said by what."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.training.errors import ExportError
from holdfast.training.export.artifacts import write_artifacts
from holdfast.training.export.formats import formats
from holdfast.training.parity.parity import Int8Limits, check_artifact, check_comparison

spec = importlib.util.spec_from_file_location(
    "seeded_faults", Path(__file__).with_name("seeded_faults.py")
)
assert spec is not None
assert spec.loader is not None
seeded_faults = importlib.util.module_from_spec(spec)
sys.modules["seeded_faults"] = seeded_faults
spec.loader.exec_module(seeded_faults)

# An ONNX export takes seconds; these faults are looked for in TorchScript as well.
SLOW_IN_ONNX = (
    "stale weights",
    "one perturbed weight",
    "swapped classes",
    "swapped outputs",
    "missing scaler",
)
CASES = [
    pytest.param(fault, form, marks=[pytest.mark.slow] if is_slow else [])
    for fault, row in seeded_faults.FAULTS.items()
    for form in row.formats
    for is_slow in [form == "onnx" and fault in SLOW_IN_ONNX]
]
EXPERIMENTS = ("Pictures", "Sequences", "TiedSequences")
HEALTHY = [(name, form) for name in EXPERIMENTS for form in formats()]


@pytest.fixture(scope="module")
def table(capsys_module: Any) -> Iterator[dict[tuple[str, str], list[str]]]:
    """Which checks caught which fault; printed when all faults were tried."""
    caught: dict[tuple[str, str], list[str]] = {}
    yield caught
    with capsys_module():
        print("\n\n| seeded fault | format | caught by |\n|---|---|---|")
        for (fault, form), checks in caught.items():
            print(f"| {fault} | {form} | {', '.join(checks)} |")


@pytest.fixture(scope="module")
def capsys_module(request: pytest.FixtureRequest) -> Any:
    manager: Any = request.config.pluginmanager.getplugin("capturemanager")
    return manager.global_and_fixture_disabled


@pytest.mark.parametrize(("name", "form"), HEALTHY)
def test_a_healthy_export_passes_every_check(exported: Any, name: str, form: str) -> None:
    case = exported[name]
    report = check_artifact(case.champion, form, formats()[form], case.place, Int8Limits())
    assert [str(finding) for finding in report.findings] == []
    if formats()[form].is_exact:
        assert report.num_tensors >= 3
        assert {"batch-1", "batch-33", "test set"} <= set(report.numbers)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_comparison_is_not_empty(exported: Any, name: str) -> None:
    assert check_comparison(exported[name].champion).findings == []


@pytest.mark.parametrize(("fault", "form"), CASES)
def test_a_seeded_fault_is_caught(
    exported: Any, tmp_path: Path, table: Any, fault: str, form: str
) -> None:
    row = seeded_faults.FAULTS[fault]
    case = exported[row.experiment]
    place = replace(case.place, bundle=tmp_path / "bundle", scratch=tmp_path / "scratch")
    for folder in (place.bundle, place.scratch):
        folder.mkdir()
    try:
        write_artifacts(row.apply(case.source), place, (form,))
    except ExportError as error:
        table[fault, form] = [f"refused by the exporter: {str(error)[:60]}"]
        return
    # What the champion itself does not use may be missing; the faulty graph has no say in it.
    (place.scratch / "unused.txt").write_text("")
    report = check_artifact(case.champion, form, formats()[form], place, Int8Limits())
    table[fault, form] = sorted({finding.check for finding in report.findings})
    assert not report.is_good, f"{fault} in {form} was not caught"
    assert all(finding.where and finding.message for finding in report.findings)
