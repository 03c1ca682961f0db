"""Does an artifact compute what the champion computes? Every reason why it may not is a finding.

The checks, by the names that findings carry:

- ``lineage``: every floating-point tensor of the champion stands in the artifact, bit by bit;
- ``signature``: names, types and dynamic batch dimension, as the file itself declares them;
- ``numbers``: outputs on every probe and on the test set within the bound of ``numbers.py``;
- ``task``: the metrics of the whole test set; ``agreement``: the classes;
- ``variation``, ``sensitivity``: the comparison is not empty, because the champion's outputs vary
  and noise on its weights would be noticed. An output of which the same is true in a model that is
  not trained, such as anchors, a temperature or a mask, is meant to be so;
- ``runtime``: the artifact could not be loaded or run. A crash is seen by ``checking.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.protocol import Artifact, Format, Place, PortSignature
from holdfast.training.export.specification import TensorSpec
from holdfast.training.loop.evaluation import metrics_of
from holdfast.training.parity.champion import Answers, Champion, score_test_set
from holdfast.training.parity.numbers import (
    NUM_EPS,
    Comparison,
    Reference,
    compare,
    different_tensors,
    perturbed_copy,
    scaled_error,
)
from holdfast.training.parity.probes import BATCH_SIZES

NOTICEABLE_NOISE = 1e-4
PRINTED_DIGITS = 4  # significant ones, as model cards print metrics
LAST_DIGIT = 1e-6  # a value on the edge of rounding is not a difference
FEW = 3


@dataclass(frozen=True)
class Finding:
    """One reason why an artifact is refused."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


@dataclass(frozen=True)
class Int8Limits:
    """What an inexact artifact may cost; see ExportConfig."""

    metric: str = "loss"
    max_metric_change: float = 0.02
    min_agreement: float = 0.98


@dataclass
class ArtifactReport:
    """What was checked on one artifact, and what was found.

    Attributes:
        numbers: probe -> output -> error and bound.
        metrics: metric -> the champion's and the artifact's value on the test set.
        agreement: output -> fraction of test samples in the champion's class.
    """

    format: str
    findings: list[Finding] = field(default_factory=list)
    num_tensors: int = 0
    numbers: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def add(self, check: str, where: str, message: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(check, where, message))

    def as_json(self) -> dict[str, Any]:
        """For ``parity.json``; the same artifact gives the same values."""
        metrics = {
            metric: {who: value if math.isfinite(value) else None for who, value in pair.items()}
            for metric, pair in self.metrics.items()
        }
        return {**asdict(self), "is_good": self.is_good, "metrics": metrics}


def check_artifact(
    champion: Answers, name: str, form: Format, place: Place, limits: Int8Limits
) -> ArtifactReport:
    """Load the artifact of a format and run every check that fits it."""
    report = ArtifactReport(name)
    try:
        artifact = form.load(place)
    except Exception as error:  # noqa: BLE001 - runtimes raise anything; each is a finding
        report.add("runtime", form.path, f"cannot be loaded: {_one_line(error)}")
        return report
    if form.is_exact:
        _check_lineage(champion, artifact, report, _read_unused(place))
    _check_signature(champion, artifact, report)
    for probe, reference in champion.references.items():
        _check_probe(champion, artifact, report, (probe, reference), form.is_exact)
    _check_test_set(champion, artifact, report, form.is_exact, limits)
    return report


def check_comparison(champion: Champion) -> ArtifactReport:
    """Could the checks fail at all? Findings here are about the champion, not an artifact."""
    report = ArtifactReport("champion")
    ports = champion.interface.outputs
    checked = {i for i, port in enumerate(ports) if "float" in port.dtype}
    still = {i for i in checked if not _varies(_column(champion.test, i))}
    noise = noticeable_noise(champion.eager)
    deaf = checked - _noticed(champion, noise)
    meant = _by_design(champion) if still | deaf else set()
    if not checked - meant:
        meant = set()  # something has to be proved
    for index in sorted(still - meant):
        num = sum(map(len, _column(champion.test, index)))
        message = f"is the same for all {num} test samples"
        if num == 1:
            message = "cannot vary over one test sample: the test split needs more"
        report.add("variation", ports[index].name, message)
    for index in sorted(deaf - meant):
        message = f"noise of {noise:g} on every weight would not be noticed"
        report.add("sensitivity", ports[index].name, message)
    return report


def _noticed(champion: Champion, noise: float) -> set[int]:
    """Outputs in which noise on every weight shows, for one of the probes at least."""
    noisy = perturbed_copy(champion.eager, noise)
    noticed: set[int] = set()
    for reference in champion.references.values():
        with torch.no_grad():
            answers = compare(list(noisy(*reference.inputs)), reference)
        noticed |= {index for index, answer in enumerate(answers) if not answer.is_good}
    return noticed


def noticeable_noise(model: nn.Module) -> float:
    """Relative noise on weights that a comparison must notice; above what their type rounds."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    coarsest = max((torch.finfo(dtype).eps for dtype in types), default=0.0)
    return max(NOTICEABLE_NOISE, NUM_EPS * coarsest)


def _by_design(champion: Answers) -> set[int]:
    """Outputs that say nothing about the weights of an untrained model either.

    They do not vary over the samples there, as anchors do not, or are what the champion's are, as
    what is handed through from the inputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = GuardedModel(champion.experiment.model(), champion.interface.form).eval()
    ordinary = champion.references[f"batch-{max(BATCH_SIZES)}"]
    with torch.no_grad():
        outputs = list(fresh(*ordinary.inputs))
    same = {i for i, answer in enumerate(compare(outputs, ordinary)) if answer.is_good}
    return same | {i for i, values in enumerate(outputs) if not _varies([values])}


def _column(references: Sequence[Reference], index: int) -> list[Tensor]:
    """What each batch has of an output; where its sizes vary, the least of each."""
    tensors = [reference.exact[index] for reference in references]
    least = [range(min(sizes)) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    for dimension, kept in enumerate(least, start=1):
        tensors = [tensor.narrow(dimension, 0, len(kept)) for tensor in tensors]
    return tensors


def _check_lineage(
    champion: Answers, artifact: Artifact, report: ArtifactReport, unused: set[str]
) -> None:
    needed = ((name, t) for name, t in champion.tensors.items() if name not in unused)
    try:
        num, wrong = different_tensors(needed, artifact.tensors(), champion.names)
    except Exception as error:  # noqa: BLE001 - an unreadable file is a finding
        report.add("lineage", "file", f"its tensors cannot be read: {_one_line(error)}")
        return
    report.num_tensors = num
    if wrong:
        message = f"differ from the champion's: {', '.join(wrong[:FEW])}"
        report.add("lineage", f"{len(wrong)} of {report.num_tensors} tensors", message)
    if report.num_tensors == 0:
        report.add("lineage", "file", "the champion has no floating-point tensor to compare")


def _check_signature(champion: Answers, artifact: Artifact, report: ArtifactReport) -> None:
    declared = artifact.signature()
    if declared is None:
        return
    expected = (champion.interface.inputs, champion.interface.outputs)
    for kind, wanted, found in zip(("inputs", "outputs"), expected, declared, strict=True):
        if [port.name for port in wanted] != [port.name for port in found]:
            names = [port.name for port in found]
            report.add("signature", kind, f"are {names}, not {[p.name for p in wanted]}")
        else:
            for mine, port in zip(found, wanted, strict=True):
                report.findings.extend(_port_findings(mine, port))


def _port_findings(found: PortSignature, wanted: TensorSpec) -> Iterator[Finding]:
    if found.dtype != wanted.dtype:
        yield Finding("signature", found.name, f"has type {found.dtype}, not {wanted.dtype}")
    if not found.shape or found.shape[0] is not None:
        yield Finding("signature", found.name, f"has a fixed batch: shape {list(found.shape)}")
    if tuple(found.shape[1:]) != tuple(n if isinstance(n, int) else None for n in wanted.shape):
        shapes = f"{list(found.shape[1:])}, not {list(wanted.shape)}"
        yield Finding("signature", found.name, f"has a sample of shape {shapes}")


def _check_probe(
    champion: Answers,
    artifact: Artifact,
    report: ArtifactReport,
    probe: tuple[str, Reference],
    is_exact: bool,
) -> None:
    name, reference = probe
    try:
        found = artifact.run(reference.inputs)
    except Exception as error:  # noqa: BLE001 - runtimes raise anything; each is a finding
        report.add("runtime", f"input {name}", _one_line(error))
        return
    answers = compare(found, reference)
    if not is_exact:
        answers = [answer for answer in answers if math.isinf(answer.error)]
    _note(champion, report, name, answers, has_all=is_exact)


def _note(
    champion: Answers,
    report: ArtifactReport,
    probe: str,
    answers: list[Comparison],
    *,
    has_all: bool = True,
) -> None:
    names = [port.name for port in champion.interface.outputs]
    for name, answer in zip(names, answers, strict=has_all):
        if math.isfinite(answer.error):
            entry = {"bound": answer.bound, "error": answer.error}
            known = report.numbers.setdefault(probe, {}).get(name)
            if known is None or _share(entry) > _share(known):
                report.numbers[probe][name] = entry
        if not answer.is_good:
            figures = f"error {answer.error:.3g}, bound {answer.bound:.3g}"
            report.add("numbers", f"input {probe}, output {name}", f"{answer.reason} ({figures})")


def _share(entry: dict[str, float]) -> float:
    """How much of what may be is used up; integers may not differ at all."""
    return entry["error"] / (entry["bound"] or 1.0)


def _check_test_set(
    champion: Answers,
    artifact: Artifact,
    report: ArtifactReport,
    is_exact: bool,
    limits: Int8Limits,
) -> None:
    experiment = champion.experiment
    try:
        records, seen = score_test_set(
            experiment, champion.interface, artifact.run, champion.batch_size
        )
    except Exception as error:  # noqa: BLE001 - runtimes raise anything; each is a finding
        report.add("runtime", "test set", _one_line(error))
        return
    metrics = metrics_of(experiment, records)
    for name, value in champion.metrics.items():
        report.metrics[name] = {"artifact": metrics[name], "champion": value}
    _measure_agreement(champion, report, seen)
    if not is_exact:
        _gate_inexact(report, limits)
        return
    for found, reference in zip(seen, champion.test, strict=True):
        _note(champion, report, "test set", compare(found, reference))
    for name, pair in report.metrics.items():
        if not _prints_the_same(pair["artifact"], pair["champion"]):
            message = f"{pair['artifact']:.6g} instead of {pair['champion']:.6g}"
            report.add("task", name, message)


def _measure_agreement(champion: Answers, report: ArtifactReport, seen: list[list[Tensor]]) -> None:
    """Top-1 agreement of outputs that look like classes: two or more numbers for each sample."""
    for index, port in enumerate(champion.interface.outputs):
        num_classes = port.shape[0] if len(port.shape) == 1 else 0
        if port.dtype.startswith("float") and isinstance(num_classes, int) and num_classes > 1:
            pairs = zip(seen, champion.test, strict=True)
            same = torch.cat(
                [found[index].argmax(1) == ref.eager[index].argmax(1) for found, ref in pairs]
            )
            report.agreement[port.name] = float(same.double().mean())


def _gate_inexact(report: ArtifactReport, limits: Int8Limits) -> None:
    pair = report.metrics[limits.metric]
    change = abs(pair["artifact"] - pair["champion"]) / max(abs(pair["champion"]), 1e-12)
    if not change <= limits.max_metric_change:
        report.add(
            "task",
            limits.metric,
            f"changes from {pair['champion']:.6g} to {pair['artifact']:.6g}, by {change:.2%}; "
            f"at most {limits.max_metric_change:.2%} is allowed",
        )
    for name, share in report.agreement.items():
        if share < limits.min_agreement:
            message = f"{share:.2%} of the test samples; at least {limits.min_agreement:.2%}"
            report.add("agreement", name, message)


def _varies(batches: Sequence[Tensor]) -> bool:
    """Whether samples that are finite differ from the first of them."""
    samples = (sample for batch in batches for sample in batch if torch.isfinite(sample).all())
    first = next(samples, None)
    return first is not None and any(scaled_error(each, first) > LAST_DIGIT for each in samples)


def _prints_the_same(found: float, wanted: float) -> bool:
    if math.isnan(wanted):
        return math.isnan(found)
    near = math.isclose(found, wanted, rel_tol=LAST_DIGIT, abs_tol=LAST_DIGIT)
    return near or f"{found:.{PRINTED_DIGITS}g}" == f"{wanted:.{PRINTED_DIGITS}g}"


def _read_unused(place: Place) -> set[str]:
    path = place.scratch / "unused.txt"
    return set(path.read_text().splitlines()) if path.is_file() else set()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def all_findings(reports: Iterable[ArtifactReport]) -> list[str]:
    """Every finding as ``format: check: where: message``."""
    return [f"{report.format}: {finding}" for report in reports for finding in report.findings]
