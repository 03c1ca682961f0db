"""The gate's fresh process: a crash of the runtime is a finding, and the others are judged on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import ExportError
from holdfast.training.parity.checking import CheckRequest, check_in_fresh_process

EXPERIMENTS = Path(__file__).parents[1] / "export" / "export_experiments.py"
CONFIG = RunConfig().model_dump(mode="json")
CONFIG["export"]["num_latency_runs"] = 10
CONFIG["data"]["evaluation_batch_size"] = 32


def request(exported: Any, scratch: Path, formats: tuple[str, ...], name: str) -> CheckRequest:
    case = exported["Sequences"]
    for path in case.place.scratch.iterdir():
        (scratch / path.name).write_bytes(path.read_bytes())
    return CheckRequest(
        experiment=f"{EXPERIMENTS}:{name}",
        config=CONFIG,
        champion=str(case.champion_path),
        bundle=str(case.place.bundle),
        scratch=str(scratch),
        formats=formats,
    )


def test_a_crash_of_the_runtime_is_a_finding_and_the_rest_goes_on(
    exported: Any, tmp_path: Path
) -> None:
    asked = request(exported, tmp_path, ("onnx", "torchscript"), "CrashingSequences")
    reports = check_in_fresh_process(asked, "parity").reports
    assert reports["champion"]["is_good"]
    assert reports["torchscript"]["is_good"]
    (finding,) = reports["onnx"]["findings"]
    assert finding["check"] == "runtime"
    assert "crashed the runtime (killed by SIGABRT)" in finding["message"]


def test_a_notice_stops_the_child_at_once(exported: Any, tmp_path: Path) -> None:
    asked = request(exported, tmp_path, ("onnx",), "Sequences")
    outcome = check_in_fresh_process(asked, "parity", should_stop=lambda: True)
    assert outcome.is_stopped
    assert outcome.reports == {}


def test_a_check_that_takes_too_long_fails(exported: Any, tmp_path: Path) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["export"]["timeout_s"] = 0.2
    asked = replace(request(exported, tmp_path, ("onnx",), "Sequences"), config=config)
    with pytest.raises(ExportError, match=r"out of time after 0\.2 s"):
        check_in_fresh_process(asked, "parity")
