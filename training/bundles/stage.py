"""The stage ``export``: champion → artifacts → parity → latency → bundle."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from holdfast.training.averages.ensemble import experiment_of
from holdfast.training.bundles import consumer
from holdfast.training.bundles.bundle import (
    BundleFacts,
    complete_bundle,
    publish,
    require_replaceable,
    verified,
)
from holdfast.training.certificate.kept import read_certificate
from holdfast.training.checkpointing.tensor_file import MappedFile
from holdfast.training.errors import (
    BundleError,
    ExportError,
    HoldfastError,
    ParityError,
    StorageFullError,
)
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.experiment.protocol import Experiment, has_test_data
from holdfast.training.export.artifacts import chosen_formats, open_champion, write_artifacts
from holdfast.training.export.formats import formats
from holdfast.training.export.parts import FOLDER, part_artifacts, write_parts
from holdfast.training.export.specification import Interface, export_spec
from holdfast.training.export.weights import read_tensors
from holdfast.training.loop.experiment_state import experiment_checkpoint, restore_experiment
from holdfast.training.parity.assembly import check_names
from holdfast.training.parity.checking import Action, CheckRequest, check_in_fresh_process
from holdfast.training.parity.merging import is_as_trained, merged_experiment, write_exported
from holdfast.training.runs.directory import RunDirectory, utc_now
from holdfast.training.runs.durable_json import FULL_ERRNOS
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.losses import compare_losses
from holdfast.training.runs.stored_json import Kinds, read_json, required_fields
from holdfast.training.stage import EXIT_PREEMPTED, Stage, StageOutcome

MAX_SHOWN = 5
NO_SPACE = os.strerror(errno.ENOSPC)
CHAMPION: Kinds = {
    "name": (str,),
    "path": (str,),
    "digest": (str,),
    "metrics": (dict, type(None)),
}


@dataclass(frozen=True)
class ChosenChampion:
    """What ``evaluation.json`` says about the champion: its metrics on validation and test data."""

    name: str
    path: Path
    digest: str
    metrics: Mapping[str, Any]
    test_metrics: Mapping[str, Any] | None


@dataclass(frozen=True)
class Export:
    """One export, between taking the run over and publishing."""

    stage: Stage
    lease: Lease
    champion: ChosenChampion
    formats: tuple[str, ...]

    @property
    def experiment(self) -> Experiment:
        """Its model is built as the champion is: of an ensemble with all its members."""
        return experiment_of(self.stage.experiment, self.champion.name)

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
        interfaces = self._write()
        if interfaces is None:
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
            "losses": compare_losses(self.stage.run).as_json(),
        }
        certificate = read_certificate(self.stage.run, self.stage.record)
        if certificate is not None:
            measured["certificate"] = certificate.as_json()
        facts = self._facts(*interfaces, reports, measured)
        manifest = complete_bundle(self.staging, facts, self.scratch)
        require_own_proof(self.staging, self.stage.config.export.timeout_s)
        self.lease.check()
        publish(self.staging, self.stage.run.bundle)
        shutil.rmtree(self.scratch, ignore_errors=True)
        return manifest

    def _write(self) -> tuple[Interface, Mapping[str, Interface]] | None:
        for folder in (self.staging, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)
        experiment, champion = self._exported()
        source, place = open_champion(
            experiment,
            champion,
            self.stage.config.export,
            self.staging,
            self.scratch,
        )
        if not write_artifacts(source, place, self.formats, self._before_each):
            return None
        interface = source.interface
        del source  # each part has all the weights once more
        parts = write_parts(
            experiment,
            champion,
            self.stage.config.export,
            (self.staging, self.scratch),
            self.formats,
            self._before_each,
        )
        return None if parts is None else (interface, parts)

    def _exported(self) -> tuple[Experiment, Path]:
        """The experiment and the weights of the model that is exported."""
        experiment, config = self.stage.experiment, self.stage.config.checkpoint
        if is_as_trained(experiment, config):
            return self.experiment, self.champion.path
        self.scratch.mkdir()
        weights, checkpoint = (
            read_tensors(self.champion.path),
            experiment_checkpoint(self.stage.run),
        )
        path = write_exported(experiment, weights, config, checkpoint, self.scratch)
        return merged_experiment(experiment), path

    def _before_each(self, name: str) -> bool:
        self.lease.check()
        num_done = self.formats.index(name) if name in self.formats else len(self.formats)
        self._say(num_done, f"write {name}")
        return not self.stage.should_stop()

    def _check(self, action: Action) -> dict[str, Any] | None:
        self._say(len(self.formats) + ("parity", "latency").index(action), f"check {action}")
        experiment = self.experiment
        if action == "parity":
            parts = check_names(experiment, self.formats)
        else:
            parts = tuple(part_artifacts(experiment, self.formats))
        request = CheckRequest(
            experiment=self.stage.arguments.experiment,
            config=self.stage.config.model_dump(mode="json"),
            champion=str(self.scratch / "champion.safetensors"),
            bundle=str(self.staging),
            scratch=str(self.scratch),
            formats=self.formats,
            parts=parts,
            folder=str(self.stage.arguments.folder),
            state=str(state) if (state := experiment_checkpoint(self.stage.run)) else None,
            seeds=self.stage.record.seeds,
            candidate=self.champion.name,
        )
        outcome = check_in_fresh_process(request, action, self.stage.should_stop)
        return None if outcome.is_stopped else outcome.reports

    def _say(self, num_done: int, message: str) -> None:
        total = len(self.formats) + 2
        self.stage.progress.emit(
            "progress", stage="export", done=num_done, total=total, message=message
        )

    def _facts(
        self,
        interface: Interface,
        parts: Mapping[str, Interface],
        reports: Mapping[str, Any],
        measured: Mapping[str, Any],
    ) -> BundleFacts:
        stage, spec, table = self.stage, export_spec(self.experiment), formats()
        paths = {name: table[name].path for name in self.formats}
        paths |= part_artifacts(self.experiment, self.formats)
        rows = [
            _parity_row(name, path, reports[name], (self.staging / path).stat().st_size)
            for name, path in paths.items()
        ]
        test = self.champion.test_metrics
        if test is None and not has_test_data(stage.experiment):
            test = {}
        elif test is None:
            test = {name: two["champion"] for name, two in reports["weights"]["metrics"].items()}
        return BundleFacts(
            name=experiment_name(stage.arguments.experiment),
            run_id=stage.record.run_id,
            config=stage.config.model_dump(mode="json"),
            config_digest=stage.record.config_digest,
            data_fingerprint=stage.record.data_fingerprint or "",
            versions={**stage.record.versions, **exporter_versions()},
            licence=stage.config.export.licence,
            description=spec.description,
            task=spec.task,
            interface=interface,
            parts=parts,
            max_batch_size=stage.config.export.max_batch_size,
            champion={
                "metrics": dict(self.champion.metrics),
                "name": self.champion.name,
                "sha256": self.champion.digest,
                "test_metrics": dict(test),
            },
            formats=self.formats,
            parity={"artifacts": rows, "comparison": reports["champion"], "details": reports},
            measured=measured,
            unused=unused_weights(self.scratch, tuple(parts)),
        )


def run_export(stage: Stage) -> StageOutcome:
    """Export the run's champion, prove the exports, publish ``bundle/``.

    A bundle of the same champion and formats that verifies is left as it is.

    Raises:
        ExportError: there is no champion, or it cannot be exported.
        ParityError: an artifact is not the champion; nothing is published.
        BundleError: what was written does not verify.
    """
    champion = read_champion(stage.run)
    restore_experiment(stage.experiment, experiment_checkpoint(stage.run))
    names = chosen_formats(stage.config.export)
    if is_done(stage.run.bundle, champion, names):
        return StageOutcome("completed", 0)
    require_replaceable(stage.run.bundle)
    with stage.writing() as lease, _full_disk_told(stage.run, champion, names):
        manifest = Export(stage, lease, champion, names).run()
    if manifest is None:
        return _preempted(stage)
    _tell(stage, manifest)
    return StageOutcome("completed", 0)


@contextmanager
def _full_disk_told(
    run: RunDirectory, champion: ChosenChampion, names: tuple[str, ...]
) -> Iterator[None]:
    """Raise StorageFullError where the block failed and there is no room for a bundle.

    The libraries that write artifacts tell it each in its own way, or not at all.
    """
    needed_bytes = champion.path.stat().st_size * (len(names) + 1)
    try:
        yield
    except Exception as error:
        free_bytes = shutil.disk_usage(run.path).free
        is_typed = isinstance(error, HoldfastError) and not isinstance(error, StorageFullError)
        if not _is_about_space(error) and (is_typed or free_bytes >= needed_bytes):
            raise
        raise StorageFullError(
            f"the bundle of {run.path} cannot be written: it needs about {needed_bytes:,} bytes, "
            f"{free_bytes:,} are free: make room and export again; nothing was published",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        ) from error


def _is_about_space(error: BaseException | None) -> bool:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if getattr(error, "errno", None) in FULL_ERRNOS or NO_SPACE in str(error):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def exporter_versions() -> dict[str, str]:
    """Versions of the libraries that an export depends on."""
    return {name: metadata.version(name) for name in ("onnx", "onnxruntime", "onnxscript")}


def read_champion(run: RunDirectory) -> ChosenChampion:
    """The champion of ``evaluation.json``, its file checked against the digest given there.

    Raises ExportError where nothing was chosen yet, or the file is not the one that was chosen.
    """
    try:
        evaluation = required_fields(
            read_json(run.evaluation_json), run.evaluation_json, {"champion": (dict,)}
        )
    except FileNotFoundError:
        raise ExportError(
            f"run {run.path.name} has no evaluation.json; choose a champion first: "
            "python -m holdfast.training evaluate"
        ) from None
    place = f"{run.evaluation_json}: champion"
    chosen = required_fields(evaluation["champion"], place, CHAMPION)
    path = run.path / chosen["path"]
    if not path.is_file() or not path.resolve().is_relative_to(run.candidates.resolve()):
        raise ExportError(f"the champion {chosen['path']} is missing in {run.path}")
    digest = str(chosen["digest"])
    found = consumer.file_digest(path)
    if digest.removeprefix("sha256:") != found:
        raise ExportError(
            f"the champion {chosen['path']} was altered after it was chosen: sha256 {found[:12]}…, "
            f"evaluation.json says {digest}; run the evaluation again"
        )
    tested = evaluation.get("test")
    test = tested.get("metrics") if isinstance(tested, dict) else None
    return ChosenChampion(chosen["name"], path, found, chosen.get("metrics") or {}, test)


def is_done(bundle: Path, champion: ChosenChampion, names: tuple[str, ...]) -> bool:
    """Whether the bundle is there, of this champion and these formats, and verifies."""
    if not bundle.is_dir():
        return False
    try:
        manifest = verified(bundle)
    except BundleError:
        return False
    same = manifest["champion"]["sha256"] == champion.digest
    return bool(same and set(names) <= set(manifest["formats"]))


def refuse_findings(reports: Mapping[str, Any]) -> None:
    """Raises ParityError that names each artifact, check, input and figure."""
    findings = [
        f"{name}: {finding['check']}: {finding['where']}: {finding['message']}"
        for name, report in reports.items()
        for finding in report["findings"]
    ]
    if findings:
        more = f"; and {len(findings) - MAX_SHOWN} more" if len(findings) > MAX_SHOWN else ""
        raise ParityError(
            f"the exports are not the champion, nothing was published: "
            f"{'; '.join(findings[:MAX_SHOWN])}{more}"
        )


def require_own_proof(bundle: Path, timeout_s: float) -> None:
    """Make sure that a bundle passes its own verify.py. Raises ParityError.

    int8 that is fit for the task may still be further from the champion than its golden samples
    allow, and whoever pulls it would be told that it is broken.
    """
    try:
        consumer.proof(bundle, timeout_s)
    except consumer.RefusedBundleError as error:
        way_out = (
            "leave onnx_int8 out of export.formats" if consumer.INT8_MODEL in str(error) else ""
        )
        raise ParityError(
            f"the bundle does not pass its own verify.py, nothing was published: {error}"
            f"{way_out and f'; {way_out}'}"
        ) from error


def full_checkpoint_bytes(checkpoints: Path) -> int | None:
    """Size of the newest checkpoint with an optimizer in it; None where there is none."""
    full = sorted(checkpoints.glob("step-*/optimizer*.safetensors"))
    if not full:
        return None
    return sum(path.stat().st_size for path in full[-1].parent.iterdir() if path.is_file())


def unused_weights(scratch: Path, parts: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Floating-point tensors of the champion that no output of any of its graphs depends on.

    Integers are left out: they are counts, such as those of batch norm.
    """
    layout = MappedFile(scratch / "champion.safetensors").layout
    folders = (scratch, *(scratch / FOLDER / part for part in parts))
    unused = [{*(folder / "unused.txt").read_text().splitlines()} for folder in folders]
    slots = {
        name: layout.slots[layout.aliases.get(name, name)] for name in set.intersection(*unused)
    }
    return tuple(sorted(name for name, slot in slots.items() if slot.dtype.is_floating_point))


def _parity_row(name: str, path: str, report: Mapping[str, Any], size_bytes: int) -> dict[str, Any]:
    """The figures of an artifact that are shown."""
    entries = [entry for outputs in report["numbers"].values() for entry in outputs.values()]
    worst = max(entries, key=lambda entry: entry["error"] / (entry["bound"] or 1), default=None)
    return {
        "agreement": min(report["agreement"].values(), default=None),
        "bound": worst and worst["bound"],
        "format": name,
        "is_passed": report["is_good"],
        "max_error": worst and worst["error"],
        "name": path,
        "num_compared_tensors": report["num_tensors"],
        "num_probes": len(report["numbers"]),
        "size_bytes": size_bytes,
    }


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
