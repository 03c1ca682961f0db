"""A certificate that the run keeps goes with its bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.training.certificate.kept import keep_certificate
from holdfast.training.stage import Stage
from tests.training.bundles import whole_export


@pytest.mark.slow
def test_manifest_and_card_of_a_bundle_tell_of_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = whole_export.choose

    def choose_and_certify(stage: Stage) -> Path:
        path, record = choose(stage), stage.record
        made_with = {
            "made_at": "2026-01-31T12:00:00.000000Z",
            "device": "cpu",
            "versions": record.versions,
            "code_digest": record.experiment_digest,
            "config_digest": record.config_digest,
        }
        found = {"is_exact": True, "num_steps": 40, "stops": [[3, "SIGKILL"]]}
        verdict = {"num_tensors": 7, "num_losses": 40}
        keep_certificate(stage.run, {**found, "verdict": verdict, "made_with": made_with})
        return path

    monkeypatch.setattr(whole_export, "choose", choose_and_certify)
    bundle = whole_export.export(tmp_path)
    certificate = json.loads((bundle / "manifest.json").read_text())["measured"]["certificate"]
    assert (certificate["is_exact"], certificate["differs_in"]) == (True, [])
    assert "that was stopped once in 40 steps had the bytes of" in (
        (bundle / "README.md").read_text()
    )
