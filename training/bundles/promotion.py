"""Does a new champion take the alias? Only if it is not worse than the holder, on the same data.

Both models answer the same test samples: the new bundle's and the holder's ONNX file, each in ONNX
Runtime, so that what is compared is what is served; of a bundle without ONNX its weights. What is
chance says the paired bootstrap of ``holdfast.training.champion.bootstrap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holdfast.training.averages.ensemble import experiment_of
from holdfast.training.bundles import consumer
from holdfast.training.bundles.bucket_registry import open_registry
from holdfast.training.bundles.registry import DEFAULT_ALIAS, Registry
from holdfast.training.bundles.summary import PROMOTION, promotion_fields
from holdfast.training.champion.bootstrap import resampled_metrics
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import DataFormatError, ExportError
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.experiment.protocol import Experiment, Records
from holdfast.training.export.interfaces import open_interface
from holdfast.training.export.onnx_export import OnnxArtifact, OnnxFormat
from holdfast.training.export.protocol import Artifact, Place
from holdfast.training.export.weights import WeightsFormat
from holdfast.training.loop.evaluation import metrics_of
from holdfast.training.loop.experiment_state import experiment_checkpoint, restore_experiment
from holdfast.training.parity.champion import score_test_set
from holdfast.training.runs.fenced import publish_json, take_away
from holdfast.training.runs.stored_json import read_json
from holdfast.training.stage import Stage, StageOutcome

MAX_ATTEMPTS = 10
Differences = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """The new model against the holder, on one metric.

    Attributes:
        worsening: how much worse the new one is, in units of the metric; negative is better.
        upper_limit: the worsening is below this with the configured confidence.
        allowed: what it may be.
    """

    metric: str
    new: float
    holder: float
    worsening: float
    upper_limit: float
    allowed: float

    @property
    def is_good_enough(self) -> bool:
        """A worsening above what is allowed is ruled out."""
        return self.upper_limit <= self.allowed

    def explain(self) -> str:
        """One sentence with all figures."""
        if self.is_good_enough:
            verdict = "not worse"
        else:
            verdict = "worse" if self.worsening > self.allowed else "may be worse"
        return (
            f"{verdict}: {self.metric} {self.new:.6g} against the holder's {self.holder:.6g}, "
            f"{_as_change(self.worsening)}; with confidence at most {self.upper_limit:+.3g} worse, "
            f"{self.allowed:.3g} is allowed"
        )


@dataclass(frozen=True)
class PromotionDecision:
    """What became of a published bundle."""

    name: str
    version: int
    alias: str
    is_promoted: bool
    reason: str


def run_promotion(stage: Stage) -> StageOutcome:
    """Publish the run's bundle, and let it take ``champion`` if it is not worse than the holder.

    A bundle that does not take the alias stays in the registry under its version. What was decided
    stands in ``promotion.json`` and is not decided again unless it is asked for: an alias that
    somebody moved since stays where it is. Raises BundleError where the run's bundle does not
    verify, ExportError where there is none.
    """
    if not stage.run.bundle.is_dir():
        raise ExportError(f"run {stage.run.path.name} has no bundle; export it first")
    restore_experiment(stage.experiment, experiment_checkpoint(stage.run))
    registry = open_registry(stage.arguments.store.absolute())
    with stage.writing() as lease:
        bundle = registry.publish(stage.run.bundle)
        assert bundle[0] == experiment_name(stage.arguments.experiment)
        decision = _decided(stage.run.promotion_json, bundle)
        if decision is None or stage.arguments.should_decide_again:
            decision = promote(
                registry,
                bundle,
                DEFAULT_ALIAS,
                stage.experiment,
                stage.config,
                before_move=lambda: take_away(lease, stage.run.promotion_json),
            )
            publish_json(lease, stage.run.promotion_json, asdict(decision))
    stage.progress.emit("promotion", **asdict(decision))
    return StageOutcome("completed", 0)


def _decided(path: Path, bundle: tuple[str, int]) -> PromotionDecision | None:
    """What was decided about this version before; None where nothing was."""
    try:
        known = promotion_fields(read_json(path), path)
        decision = PromotionDecision(**{name: known[name] for name in PROMOTION})
    except (FileNotFoundError, DataFormatError):
        return None
    return decision if (decision.name, decision.version) == bundle else None


def promote(
    registry: Registry,
    bundle: tuple[str, int],
    alias: str,
    experiment: Experiment,
    config: RunConfig,
    before_move: Callable[[], None] = lambda: None,
) -> PromotionDecision:
    """Move the alias to the bundle, or say why not. Several at once decide one after another.

    ``before_move`` is called before the alias moves: what was decided before is wrong from then on.
    """
    name, version = bundle
    for _ in range(MAX_ATTEMPTS):
        holder = registry.position(name, alias)
        if holder is not None and holder.version == version:
            return PromotionDecision(name, version, alias, True, f"held already: {holder.reason}")
        reason, is_good = "the first of its name", True
        if holder is not None:
            bundles = registry.bundle(name, version), registry.bundle(name, holder.version)
            if obstacle := _obstacle(*bundles, alias):
                reason = (
                    f"version {holder.version} held it, and {obstacle}, move the alias by hand "
                    f"with holdfast alias {name}@{version} {alias} --store {registry.told_store}"
                )
                return PromotionDecision(name, version, alias, False, reason)
            found = compare_bundles(*bundles, experiment, config)
            reason = f"version {holder.version} held it; {found.explain()}"
            is_good = found.is_good_enough
        if not is_good:
            return PromotionDecision(name, version, alias, False, reason)
        before_move()
        if registry.move_alias(name, alias, version, reason=reason, after=holder):
            return PromotionDecision(name, version, alias, True, reason)
    raise ExportError(f"{name}@{alias} moved {MAX_ATTEMPTS} times meanwhile; try again")


def _obstacle(new: Path, holder: Path, alias: str) -> str:
    """Why the two cannot be compared, and when the alias may move all the same; empty if they can.

    The holder is verified before it is opened: it may have been spoilt since it was published.
    """
    try:
        consumer.verify_files(holder)
    except consumer.RefusedBundleError as error:
        return f"cannot be compared: {error}. If that is known and the new one good"
    if differences := port_differences(new, holder):
        return (
            f"whoever serves {alias} would break: {'; '.join(differences)}. "
            f"Once they are ready for it"
        )
    return ""


def port_differences(new: Path, holder: Path) -> list[str]:
    """In words, each input and output that the two bundles' models do not have in common.

    As their ONNX files declare them, or where there is none, as their manifests do.

    Raises ExportError if a file cannot be opened.
    """
    before, after = _ports(holder), _ports(new)
    return [
        f"{name} was {before.get(name, 'absent')} and is {after.get(name, 'absent')}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def _ports(bundle: Path) -> dict[str, str]:
    """Types and shapes by name, in words."""
    described = {}
    if not _has_onnx(bundle):
        interface = consumer.read_manifest(bundle)["interface"]
        return {
            f"{kind} {port['name']}": _port_text(
                port["dtype"], [None, *map(_number, port["shape"])]
            )
            for kind in ("input", "output")
            for port in interface[f"{kind}s"]
        }
    try:
        inputs, outputs = OnnxArtifact(bundle / OnnxFormat.path, lineage=None).signature()
    except Exception as error:  # runtimes raise anything
        raise ExportError(f"{bundle} cannot be opened: {error}") from error
    for kind, ports in (("input", inputs), ("output", outputs)):
        for port in ports:
            described[f"{kind} {port.name}"] = _port_text(port.dtype, port.shape)
    return described


def _number(size: object) -> int | None:
    """A size of a manifest; None for the name of one that may vary."""
    return size if isinstance(size, int) else None


def _port_text(dtype: str, shape: Sequence[int | None]) -> str:
    sizes = ["any" if size is None else str(size) for size in shape]
    if shape and shape[0] is None:
        sizes[0] = "samples"
    return f"{dtype} [{', '.join(sizes)}]"


def _has_onnx(bundle: Path) -> bool:
    return (bundle / OnnxFormat.path).is_file()


def compare_bundles(
    new: Path, holder: Path, experiment: Experiment, config: RunConfig
) -> Comparison:
    """Both bundles on the experiment's test set. Raises ExportError if one does not run on it."""
    metric, mode = deciding_metric(config)
    records = [_records(bundle, experiment, config) for bundle in (new, holder)]
    values = [metrics_of(experiment, one)[metric] for one in records]
    sign = 1.0 if mode == "min" else -1.0
    differences = sign * paired_differences(
        experiment, (records[0], records[1]), metric, config.promotion.num_bootstrap
    )
    return Comparison(
        metric=metric,
        new=values[0],
        holder=values[1],
        worsening=sign * (values[0] - values[1]),
        upper_limit=float(np.quantile(differences, config.promotion.confidence)),
        allowed=config.promotion.max_worsening * abs(values[1]),
    )


def _as_change(worsening: float) -> str:
    if worsening == 0:
        return "the same"
    return f"{abs(worsening):.3g} {'worse' if worsening > 0 else 'better'}"


def deciding_metric(config: RunConfig) -> tuple[str, str]:
    """The metric of the promotion and its mode; those of the selection where none is set."""
    if config.promotion.metric is None:
        return config.selection.metric, config.selection.mode
    return config.promotion.metric, config.promotion.mode


def paired_differences(
    experiment: Experiment, records: tuple[Records, Records], metric: str, num_bootstrap: int
) -> Differences:
    """Metric of the first minus metric of the second, for each resample of the test data."""
    found = resampled_metrics(experiment, records, num_resamples=num_bootstrap, seed=0)
    assert found is not None
    return found[0][metric] - found[1][metric]


def _records(bundle: Path, experiment: Experiment, config: RunConfig) -> Records:
    if not _has_onnx(bundle):  # an ensemble's weights are read into all its members
        name = consumer.read_manifest(bundle)["champion"].get("name", "")
        experiment = experiment_of(experiment, name)
    model = experiment.model().eval()
    interface = open_interface(experiment, model, 2).interface
    place = Place(bundle, bundle, experiment.model, interface)
    try:
        artifact: Artifact = (
            OnnxArtifact(bundle / OnnxFormat.path, lineage=None)
            if _has_onnx(bundle)
            else WeightsFormat().load(place)
        )
        batch_size = config.data.evaluation_batch_size
        return score_test_set(experiment, interface, artifact.run, batch_size)[0]
    except Exception as error:  # runtimes raise anything
        raise ExportError(f"{bundle} does not run on the test data: {error}") from error
