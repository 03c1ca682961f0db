"""The stage ``export``: champion → artifacts → parity → latency → bundle."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from training.durable_json import read_json
from training.errors import BundleError, ExportError, ParityError
from training.experiment_loading import experiment_name
from training.export import consumer
from training.export.artifacts import chosen_formats, open_champion, write_artifacts
from training.export.bundle import BundleFacts, complete_bundle, publish, verified
from training.export.checking import Action, CheckRequest, check_in_fresh_process
from training.export.formats import formats
from training.export.specification import Interface, export_spec
from training.lease import Lease
from training.run_directory import RunDirectory, utc_now
from training.stage import EXIT_PREEMPTED, Stage, StageOutcome

MAX_SHOWN = 5


@dataclass(frozen=True)
class ChosenChampion:
    """What ``evaluation.json`` says about the champion."""

    name: str
    path: Path
    digest: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Export:
    """One export, between taking the run over and publishing."""

    stage: Stage
    lease: Lease
    champion: ChosenChampion
    formats: tuple[str, ...]

    @property
    def staging(self) -> Path:
        """Where the bundle grows; only the holder of the lease has it."""
        return self.lease.staging / "bundle"

    @property
    def scratch(self) -> Path:
        """What only the checks need."""
        return self.lease.staging / "export-scratch"

    def run(self) -> dict[str, Any] | None:
        """The manifest of the published bundle; None where a notice came first."""
        start_s = time.monotonic()
        interface = self._write()
        if interface is None:
            return None
        reports = self._check("parity")
        if reports is None:
            return None
        refuse_findings(reports)
        latency = self._check("latency")
        if latency is None:
            return None
        measured = {
            "created_at": utc_now(),
            "export_s": round(time.monotonic() - start_s, 2),
            "full_checkpoint_bytes": full_checkpoint_bytes(self.stage.run.checkpoints),
            "latency": latency,
        }
        facts = self._facts(interface, reports, measured)
        manifest = complete_bundle(self.staging, facts, self.scratch / "golden")
        self.lease.check()
        publish(self.staging, self.stage.run.bundle)
        shutil.rmtree(self.scratch, ignore_errors=True)
        return manifest

    def _preempted(stage: Stage) -> StageOutcome:
    notice = stage.monitor.notice
    values: dict[str, Any] = {"source": notice.source, "reason": notice.reason} if notice else {}
    return StageOutcome("preempted", EXIT_PREEMPTED, notice=values or None)


def _tell(stage: Stage, manifest: Mapping[str, Any]) -> None:
    full = manifest["measured"]["full_checkpoint_bytes"]
    weights = manifest["formats"]["weights"]["size_bytes"]
    stage.progress.emit(
        "exported",
        formats=sorted(manifest["formats"]),
        weights_bytes=weights,
        full_checkpoint_bytes=full,
        saved=round(1 - weights / full, 4) if full else None,
        duration_s=manifest["measured"]["export_s"],
    )
