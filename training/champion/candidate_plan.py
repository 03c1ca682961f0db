"""Which candidates a finished training has: a function of its checkpoints' manifests alone.

What is averaged is taken among the checkpoints that were validated, by the policies that retention
keeps them by, and never because it happens to lie on the disk.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from holdfast.training.averages.ema import Track
from holdfast.training.averages.posthoc_ema import Profile, gamma_of, reconstruct
from holdfast.training.checkpointing.loading import MODEL_NAME
from holdfast.training.checkpointing.manifest import Manifest, read_manifest
from holdfast.training.checkpointing.policy import KeepSnapshots, KeepTopK, newest_full
from holdfast.training.checkpointing.slices import open_part
from holdfast.training.checkpointing.storage import LocalReader
from holdfast.training.configuration.schema import Ranking, RunConfig
from holdfast.training.errors import SelectionError
from holdfast.training.loop.early_stopping import EarlyStopping
from holdfast.training.runs.directory import read_run_record, read_segments, run_identity
from holdfast.training.runs.paths import RunDirectory, parse_step
from holdfast.training.runs.stored_json import STATE, read_json

Kind = Literal["best", "last", "ema", "posthoc", "average", "weighted", "soup", "ensemble"]
EMA_NAME = "ema.safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A file of a checkpoint that a candidate is made from.

    Attributes:
        step: of the checkpoint.
        file: name within the checkpoint.
        digest: of the file, as the manifest has it.
        weight: what it counts; None where measuring decides.
        track: the moving average within the file; None for the weights themselves.
    """

    step: int
    file: str
    digest: str
    weight: float | None = 1.0
    track: str | None = None


def used_steps(provenance: Mapping[str, Any]) -> list[int]:
    """The checkpoints that a candidate holds; those that a soup left out have the weight 0."""
    return sorted({source["step"] for source in provenance["sources"] if source["weight"] != 0})


@dataclass(frozen=True)
class Candidate:
    """A candidate that is to be made, or was.

    Attributes:
        name: of its folder.
        kind: how it is made.
        sources: what it is made from, by step.
        base: the candidate whose weights it has with recomputed statistics of batch norm.
    """

    name: str
    kind: Kind
    sources: tuple[Source, ...]
    base: str | None = None

    @property
    def steps(self) -> list[int]:
        """The checkpoints that it is made from."""
        return sorted({source.step for source in self.sources})


@dataclass(frozen=True)
class _Training:
    """A finished training, as far as planning looks at it."""

    config: RunConfig
    manifests: dict[int, Manifest]
    last: Manifest

    def top(self, k: int, ranking: Ranking) -> list[Manifest]:
        """The best k checkpoints that were validated, by step."""
        infos = [manifest.info for manifest in self.manifests.values()]
        steps = KeepTopK(k, *ranking).keep(infos)
        return [self.manifests[step] for step in sorted(steps)]


def plan_candidates(run: RunDirectory, config: RunConfig) -> list[Candidate]:
    """The candidates of a run, the simplest first; of weights only a header is looked at.

    Raises SelectionError where training has not finished, or a checkpoint is of another run or
    another configuration.
    """
    manifests = _manifests(run)
    last = manifests[final_step(run, config, manifests)]
    # Light checkpoints may lie beyond it, of a training that came further than what it resumed.
    ended = {step: manifest for step, manifest in manifests.items() if step <= last.step}
    training = _Training(config, ended, last)
    ranking = config.selection.ranking
    candidates = [_of_models("best", "best", best) for best in [training.top(1, ranking)] if best]
    candidates.append(_of_models("last", "last", [last]))
    should_recompute = config.selection.should_recompute_batch_norm and _has_batch_norm(run, last)
    for kind, plan in _PLANNERS.items():
        for candidate in plan(training) if kind in config.selection.candidates else []:
            candidates.append(candidate)
            if should_recompute and kind != "ensemble":  # each member has its own statistics
                candidates.append(
                    replace(candidate, name=f"{candidate.name}-bn", base=candidate.name)
                )
    _require_one_run(run, [manifests[step] for c in candidates for step in c.steps])
    return candidates


def final_step(run: RunDirectory, config: RunConfig, manifests: dict[int, Manifest]) -> int:
    """The step that training ended at. Raises SelectionError where it has not ended."""
    newest = newest_full([manifest.info for manifest in manifests.values()])
    if not newest:
        raise SelectionError(f"{run.path} has no checkpoint: run the stage 'segment' first")
    (step,) = newest
    if read_run_record(run).script is not None:
        return _last_of_script(run, step)
    state: Any = read_json(run.checkpoint(step) / "state.json", STATE)
    counters, max_steps = state["counters"], config.train.max_steps
    is_ended = counters["step_in_epoch"] == 0 and (
        counters["epoch"] >= config.train.num_epochs
        or (max_steps is not None and counters["step"] >= max_steps)
        or EarlyStopping(**state["early_stopping"]).should_stop(config.early_stopping)
    )
    if not is_ended:
        raise SelectionError(
            f"training of {run.path} has not finished: {counters['epoch']} of "
            f"{config.train.num_epochs} epochs are done; run the stage 'segment' until it exits "
            "with 0"
        )
    return step


def _last_of_script(run: RunDirectory, step: int) -> int:
    """What a script's loop has left to do, its last segment tells alone."""
    segments = read_segments(run)
    if not segments or segments[-1].outcome != "completed":
        raise SelectionError(
            f"training of {run.path} has not finished: {step} steps are done; let its script run "
            f"until it exits with 0"
        )
    return step


def metric_weights(values: Sequence[float], mode: Literal["min", "max"]) -> list[float]:
    """What checkpoints count in the metric-weighted average: exp(-d / mean d).

    d is a checkpoint's distance from the best value, so neither the metric's unit nor its offset
    matters: the best counts 1, one at the mean distance 1/e. Equal values count alike; one that is
    not finite counts nothing.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return [1.0] * len(values)
    best = min(finite) if mode == "min" else max(finite)
    mean = math.fsum(abs(value - best) for value in finite) / len(finite)
    return [
        math.exp(-abs(value - best) / mean if mean > 0 else 0.0) if math.isfinite(value) else 0.0
        for value in values
    ]


def _moving_averages(training: _Training) -> list[Candidate]:
    names = [Track("decay", decay).name for decay in training.config.ema.decays]
    return [
        Candidate(f"ema-{name}", "ema", (_of_track(training.last, name, 1.0),)) for name in names
    ]


def _reconstructed(training: _Training) -> list[Candidate]:
    """Post-hoc averages; one that the snapshots cannot give is left out with a warning."""
    ema, last = training.config.ema, training.last
    if not ema.posthoc_gammas:
        return []
    infos = [manifest.info for manifest in training.manifests.values()]
    steps = KeepSnapshots(ema.posthoc_snapshot_epochs).keep(infos) | {last.step}
    snapshots = [
        Profile(step, gamma)
        for step in sorted(steps)
        for gamma in ema.posthoc_gammas
        if training.manifests[step].files_of(EMA_NAME)
    ]
    candidates = []
    for width in ema.posthoc_widths:
        name, target = f"posthoc-{width!r}", Profile(last.step, gamma_of(width))
        try:
            found = reconstruct(snapshots, target, ema.posthoc_max_error)
        except SelectionError as error:
            logger.warning("there is no candidate %s: %s", name, error)
            continue
        sources = (
            _of_track(training.manifests[profile.step], Track("gamma", profile.gamma).name, weight)
            for profile, weight in sorted(found.items())
        )
        candidates.append(Candidate(name, "posthoc", tuple(sources)))
    return candidates


def _average(training: _Training) -> list[Candidate]:
    return _of_top(training, "average", lambda top: [1.0] * len(top))


def _weighted(training: _Training) -> list[Candidate]:
    metric, mode = training.config.selection.top_k_ranking
    return _of_top(
        training, "weighted", lambda top: metric_weights([m.metrics[metric] for m in top], mode)
    )


def _soup(training: _Training) -> list[Candidate]:
    return _of_top(training, "soup", lambda top: [None] * len(top))


def _ensemble(training: _Training) -> list[Candidate]:
    return _of_top(training, "ensemble", lambda top: [1.0] * len(top))


_PLANNERS: dict[Kind, Callable[[_Training], list[Candidate]]] = {
    "ema": _moving_averages,
    "posthoc": _reconstructed,
    "average": _average,
    "weighted": _weighted,
    "soup": _soup,
    "ensemble": _ensemble,
}
"""Averaged candidates, the simplest first; of equally good ones the first wins."""


def _of_top(
    training: _Training, kind: Kind, weigh: Callable[[list[Manifest]], Sequence[float | None]]
) -> list[Candidate]:
    selection = training.config.selection
    top = training.top(selection.top_k, selection.top_k_ranking)
    return [_of_models(f"{kind}-top-{len(top)}", kind, top, weigh(top))] if len(top) > 1 else []


def _of_models(
    name: str, kind: Kind, manifests: list[Manifest], weights: Sequence[float | None] = (1.0,)
) -> Candidate:
    sources = (
        Source(manifest.step, MODEL_NAME, manifest.digest_of(MODEL_NAME), weight)
        for manifest, weight in zip(manifests, weights, strict=True)
    )
    return Candidate(name, kind, tuple(sources))


def _of_track(manifest: Manifest, track: str, weight: float) -> Source:
    if not manifest.files_of(EMA_NAME):
        raise SelectionError(f"the checkpoint of step {manifest.step} holds no moving averages")
    return Source(manifest.step, EMA_NAME, manifest.digest_of(EMA_NAME), weight, track)


def _manifests(run: RunDirectory) -> dict[int, Manifest]:
    names = LocalReader(run.checkpoints).names()
    steps = sorted(step for step in map(parse_step, names) if step is not None)
    return {step: read_manifest(run.checkpoint(step)) for step in steps}


def _has_batch_norm(run: RunDirectory, last: Manifest) -> bool:
    names = open_part(run.checkpoint(last.step) / MODEL_NAME).layout.slots.keys()
    tracked = {name.removesuffix("num_batches_tracked") for name in names}
    return any(f"{prefix}running_var" in names for prefix in tracked - names)


def _require_one_run(run: RunDirectory, manifests: Sequence[Manifest]) -> None:
    record = read_run_record(run)
    for manifest in manifests:
        path = run.checkpoint(manifest.step)
        if manifest.config_digest not in record.config_digests:
            raise SelectionError(
                f"{path} was made by the configuration {manifest.config_digest}, this run has "
                f"{record.config_digest}: they are not averaged or compared; move it away"
            )
        if manifest.run not in ("", run_identity(record)):
            raise SelectionError(
                f"{path} is of the run {manifest.run}, this is {run_identity(record)}: they are "
                "not averaged or compared; move it away"
            )
