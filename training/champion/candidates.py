"""Candidates: weights that may win, each in a folder of its own with where it comes from.

``candidates/<name>/`` holds ``model.safetensors`` and ``provenance.json``. A candidate that is
there and is made of the same files is left alone, so a stage that was killed goes on.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from holdfast.training.averages.averaging import DIGEST, Term, write_average, write_weights
from holdfast.training.averages.ensemble import require_one_graph, write_ensemble
from holdfast.training.averages.soup import GreedyStep, greedy_soup
from holdfast.training.champion.batch_norm import recompute_batch_norm, training_batches
from holdfast.training.champion.candidate_plan import (
    Candidate,
    Kind,
    Source,
    final_step,
    plan_candidates,
)
from holdfast.training.checkpointing.loading import MODEL_NAME
from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.manifest import read_manifest
from holdfast.training.checkpointing.slices import digest_of_part
from holdfast.training.checkpointing.tensor_file import parse_tensors
from holdfast.training.errors import CheckpointCorruptError, DataFormatError, StorageError
from holdfast.training.exactness.seeding import seed_generators
from holdfast.training.experiment.model_call import call_form
from holdfast.training.loop.evaluation import evaluate, metrics_of
from holdfast.training.loop.experiment_state import experiment_checkpoint, restore_experiment
from holdfast.training.loop.train_step import resolve_device
from holdfast.training.optimizers.schedule import named_metric
from holdfast.training.runs.durable_json import storage_error, sync_folder
from holdfast.training.runs.durable_json import write_json_durably as write_json
from holdfast.training.runs.fenced import publish_json, take_away
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import (
    Kinds,
    read_json,
    required_fields,
    shape_expected,
)
from holdfast.training.stage import EXIT_PREEMPTED, Stage, StageOutcome
from holdfast.training.weights.frozen import load_saved

__all__ = [
    "DIGEST",
    "WEIGHTS_NAME",
    "Candidate",
    "Kind",
    "final_step",
    "made_digest",
    "plan_candidates",
    "preempted",
    "run_candidates",
]

WEIGHTS_NAME = "model.safetensors"
PROVENANCE_NAME = "provenance.json"
LATENCY_NAME = "latency.json"
RECORD_FILES = ("validation.safetensors", "test.safetensors")
CANDIDATE_FILES = (WEIGHTS_NAME, PROVENANCE_NAME, LATENCY_NAME, *RECORD_FILES)
GREEDY_SUFFIX = ".greedy.json"
TRIAL: Kinds = {"step": (int,), "metric": (float, type(None)), "is_kept": (bool,)}
HOW: dict[Kind, str] = {
    "best": "the checkpoint with the best validation metric",
    "last": "the checkpoint that training ended with",
    "ema": "an exponential moving average of the weights of all steps",
    "posthoc": "snapshots of power-function averages, combined by least squares (Karras 2024)",
    "average": "the mean of the best checkpoints",
    "weighted": "the mean of the best checkpoints, weighted by exp(-d / mean d), where d is the "
    "distance of a validation metric from the best",
    "ensemble": "the best checkpoints side by side: the mean of what they return",
    "soup": "the mean of those of the best checkpoints that did not worsen the validation metric "
    "when they were added, the best first (Wortsman 2022)",
}


class _StoppedError(Exception):
    """A notice came; caught in this module."""


def run_candidates(stage: Stage) -> StageOutcome:
    """Make the candidates of a finished training. Those that are there already are kept.

    Raises:
        SelectionError: training has not finished, or checkpoints do not belong together.
        ConfigError: an ensemble is asked for of a model that is served as several graphs.
        CheckpointCorruptError: a checkpoint that is needed was changed.
    """
    if "ensemble" in stage.config.selection.candidates:
        require_one_graph(stage.experiment, stage.config.checkpoint.frozen)
    planned = plan_candidates(stage.run, stage.config)
    restore_experiment(stage.experiment, experiment_checkpoint(stage.run))
    with stage.writing() as lease:
        stage.run.candidates.mkdir(exist_ok=True)
        _clear_leftovers(stage.run, lease, {candidate.name for candidate in planned})
        maker = _Maker(stage, lease)
        try:
            for number, candidate in enumerate(planned):
                maker.stop_if_asked()
                message = f"make {candidate.name}"
                stage.progress.emit(
                    "progress", stage="candidates", done=number, total=len(planned), message=message
                )
                if made_digest(stage.run, candidate) is None:
                    maker.make(candidate)
        except _StoppedError:
            return preempted(stage)
    return StageOutcome("completed", 0)


def preempted(stage: Stage) -> StageOutcome:
    """The outcome of a stage that a notice ended."""
    notice = stage.monitor.notice
    values: dict[str, Any] = {"source": notice.source, "reason": notice.reason} if notice else {}
    return StageOutcome("preempted", EXIT_PREEMPTED, notice=values or None)


def made_digest(run: RunDirectory, candidate: Candidate) -> str | None:
    """Digest of a candidate's file; None where it is missing, altered, or made of other sources."""
    folder = run.candidates / candidate.name
    try:
        provenance: Any = read_json(folder / PROVENANCE_NAME)
        with shape_expected(folder / PROVENANCE_NAME):
            found = [Source(**source) for source in provenance["sources"]]
        _, digest = read_file(folder / WEIGHTS_NAME, DIGEST, on_bytes=lambda _: None)
    except (FileNotFoundError, CheckpointCorruptError, DataFormatError):
        return None
    is_planned = len(found) == len(candidate.sources) and all(
        # A weight that measuring decides is not known when planning.
        source == (planned if planned.weight is not None else _weighted(planned, source.weight))
        for source, planned in zip(found, candidate.sources, strict=True)
    )
    is_same = is_planned and provenance.get("base") == candidate.base
    return digest if is_same and digest == provenance.get("digest") else None


@dataclass
class _Maker:
    """Makes candidates as the run's writer. A source is verified once."""

    stage: Stage
    lease: Lease
    verified: set[Path] = field(default_factory=set)

    def make(self, candidate: Candidate) -> None:
        """Make one, and publish it with its provenance."""
        run, lease = self.stage.run, self.lease
        staged, target = (
            lease.staging / f"candidate-{candidate.name}",
            run.candidates / candidate.name,
        )
        _require_own(target)
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            write = self._write_averaged if candidate.base is None else self._write_recomputed
            provenance = write(candidate, staged / WEIGHTS_NAME)
            write_json(staged / PROVENANCE_NAME, provenance)
            lease.check()
            take_away(lease, target)
            staged.rename(target)
            sync_folder(run.candidates)
        except OSError as error:
            lease.check()
            raise storage_error("write", target, error) from error

    def stop_if_asked(self) -> None:
        """Raise _StoppedError where a notice has come."""
        if self.stage.should_stop():
            raise _StoppedError

    def _write_averaged(self, candidate: Candidate, path: Path) -> dict[str, Any]:
        trials = self._soup(candidate) if candidate.kind == "soup" else []
        kept = {trial.step for trial in trials if trial.is_kept}
        sources = [
            source if source.weight is not None else _weighted(source, float(source.step in kept))
            for source in candidate.sources
        ]
        return {
            "base": None,
            "batch_norm": None,
            "digest": self._write_weights(candidate, sources, path),
            "greedy_steps": [asdict(trial) for trial in trials],
            "how": HOW[candidate.kind],
            "kind": candidate.kind,
            "name": candidate.name,
            "sources": [asdict(source) for source in sources],
        }

    def _write_recomputed(self, candidate: Candidate, path: Path) -> dict[str, Any]:
        assert candidate.base is not None
        base = self.stage.run.candidates / candidate.base
        tensors, _ = self._read(base / WEIGHTS_NAME)
        model = self._model(base / WEIGHTS_NAME)
        form = call_form(self.stage.experiment, model)
        statistics = recompute_batch_norm(model, self._batches(), form)
        digest = write_weights(path, {**tensors, **statistics})
        provenance: Any = read_json(base / PROVENANCE_NAME)
        num_steps = self.stage.config.selection.batch_norm_steps
        return {
            **provenance,
            "base": candidate.base,
            "batch_norm": f"recomputed on the first training epoch, at most {num_steps} steps",
            "digest": digest,
            "name": candidate.name,
        }

    def _write_weights(self, candidate: Candidate, sources: Sequence[Source], path: Path) -> str:
        if candidate.kind != "ensemble":
            return self._average(sources, path)
        files = [self.stage.run.checkpoint(source.step) / source.file for source in sources]
        for file, source in zip(files, sources, strict=True):
            self._verify(file, source.digest)
        return write_ensemble(path, files)

    def _average(self, sources: Sequence[Source], path: Path) -> str:
        """Write the average of verified sources, in the types of the newest one's model."""
        run = self.stage.run
        for source in sources:
            self._verify(run.checkpoint(source.step) / source.file, source.digest)
        newest = max(source.step for source in sources)
        terms = [
            Term(
                run.checkpoint(source.step) / source.file,
                source.weight,
                "" if source.track is None else f"{source.track}/",
            )
            for source in sources
            if source.weight
        ]
        has_tracks = any(source.track is not None for source in sources)
        template = run.checkpoint(newest) / MODEL_NAME if has_tracks else None
        return write_average(path, terms, template)

    def _verify(self, path: Path, digest: str) -> None:
        if path in self.verified:
            return
        found = digest_of_part(path, digest.partition(":")[0])
        if found != digest:
            raise CheckpointCorruptError(
                f"{path} was changed: the manifest says its digest is {digest}, found {found}; "
                f"restore it, or move {path.parent.name} away: candidates are then made without it"
            )
        self.verified.add(path)

    def _soup(self, candidate: Candidate) -> list[GreedyStep]:
        """The trials of a soup, those of an earlier process first; each is durable when made."""
        log = self.stage.run.candidates / f"{candidate.name}{GREEDY_SUFFIX}"
        planned = [asdict(source) for source in candidate.sources]

        def keep(steps: Sequence[GreedyStep]) -> None:
            told = [asdict(step) for step in steps]
            publish_json(self.lease, log, {"sources": planned, "steps": told})

        sources = {source.step: _weighted(source, 1.0) for source in candidate.sources}
        trials = greedy_soup(
            self._ranked(candidate),
            self.stage.config.selection.mode,
            lambda steps: self._metric([sources[step] for step in steps]),
            _known_trials(log, planned),
            keep,
        )
        if trials is None:
            raise _StoppedError
        return trials

    def _ranked(self, candidate: Candidate) -> list[int]:
        """Its checkpoints, the best by what decides first; of equal ones the earlier."""
        metric = self.stage.config.selection.metric
        sign = 1.0 if self.stage.config.selection.mode == "min" else -1.0
        values = {
            step: read_manifest(self.stage.run.checkpoint(step)).metrics[metric]
            for step in candidate.steps
        }
        return sorted(values, key=lambda s: (math.isnan(values[s]), sign * values[s], s))

    def _metric(self, sources: Sequence[Source]) -> float | None:
        """Validation metric of an average; None where a notice came."""
        path = self.lease.staging / "trial.safetensors"
        path.unlink(missing_ok=True)
        self._average(sources, path)
        stage, name = self.stage, self.stage.config.selection.metric
        records = evaluate(
            stage.experiment,
            self._model(path),
            stage.experiment.dataset("validation"),
            batch_size=stage.config.data.evaluation_batch_size,
            should_stop=stage.should_stop,
        )
        if records is None:
            return None
        return named_metric(metrics_of(stage.experiment, records), name, "selection.metric")

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        for inputs in training_batches(self.stage):
            self.stop_if_asked()
            yield inputs

    def _model(self, path: Path) -> nn.Module:
        seed_generators(self.stage.seed("model"))
        model = self.stage.experiment.model()
        weights, config = self._read(path)[0], self.stage.config.checkpoint
        load_saved(model, weights, config, experiment_checkpoint(self.stage.run))
        return model.to(resolve_device(self.stage.config.train.device))

    def _read(self, path: Path) -> tuple[dict[str, Tensor], str]:
        content, digest = read_file(path, DIGEST)
        return parse_tensors(content, str(path)), digest


def _weighted(source: Source, weight: float | None) -> Source:
    return replace(source, weight=weight)


def _known_trials(log: Path, planned: list[dict[str, Any]]) -> list[GreedyStep]:
    try:
        known: Any = read_json(log)
        with shape_expected(log):
            is_same = known["sources"] == planned
            steps = [required_fields(step, log, TRIAL) for step in known["steps"]]
            return [GreedyStep(**step) for step in steps] if is_same else []
    except (FileNotFoundError, DataFormatError):
        return []


def _clear_leftovers(run: RunDirectory, lease: Lease, planned: set[str]) -> None:
    """Take away candidates of another training; what was not made now must not be looked at.

    What Holdfast did not make is left alone.
    """
    for path in sorted(run.candidates.iterdir()):
        is_left_over = path.name.removesuffix(GREEDY_SUFFIX) not in planned
        is_trials = path.name.endswith(GREEDY_SUFFIX) and path.is_file() and not path.is_symlink()
        if is_left_over and (is_trials or _stranger_in(path) is None):
            take_away(lease, path)


def _stranger_in(folder: Path) -> str | None:
    """What a candidate's folder holds beside a candidate's files; None where that is nothing."""
    if folder.is_symlink() or not folder.is_dir():
        return "."
    names = sorted(path.name for path in folder.iterdir())
    return next((name for name in names if name not in CANDIDATE_FILES), None)


def _require_own(folder: Path) -> None:
    """Raise StorageError where replacing a candidate would delete what Holdfast did not make."""
    stranger = _stranger_in(folder) if folder.exists() or folder.is_symlink() else None
    if stranger is not None:
        raise StorageError(
            f"{folder / stranger} is not a file of a candidate, and making the candidate again "
            "would delete it: move it away"
        )
