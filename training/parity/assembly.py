"""Do the exported parts together do what the champion's parts do together?

The checks of a run's parts have names: ``<part>.champion`` (could the comparison fail at all?),
``<part>.<format>`` (all checks of ``parity.py``), and ``together.<format>``: on the whole test set
every integer that the parts compute together, such as the tokens of a translation, must be the
champion's, and every metric the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from holdfast.training.data.loader import evaluation_batches
from holdfast.training.exactness.seeding import preserved_generators, seed_scoring
from holdfast.training.experiment.protocol import Batch, Experiment, concatenate
from holdfast.training.export.formats import formats
from holdfast.training.export.parts import (
    InParts,
    eager_runs,
    graph_of,
    part_formats,
    part_names,
)
from holdfast.training.export.protocol import Place, Runner
from holdfast.training.loop.evaluation import as_arrays, metrics_of
from holdfast.training.parity.champion import Answers, Champion
from holdfast.training.parity.golden import write_golden
from holdfast.training.parity.parity import (
    ArtifactReport,
    Int8Limits,
    check_artifact,
    check_comparison,
)

TOGETHER = "together"
PRINTED = 1e-4


def check_names(experiment: Experiment, names: Sequence[str]) -> tuple[str, ...]:
    """The checks of the parts that a bundle in these formats needs."""
    parts = part_names(experiment)
    if not parts:
        return ()
    single = [f"{part}.{name}" for part in parts for name in ("champion", *part_formats(names))]
    return (*single, *(f"{TOGETHER}.{name}" for name in part_formats(names)))


class PartChecks:
    """The checks of one champion's parts. What the champion answers is computed once.

    ``folders`` are bundle and scratch of the whole model. ``<part>.champion`` also writes
    ``num_golden`` golden samples below the part's scratch.
    """

    def __init__(
        self,
        experiment: Experiment,
        champion: Path,
        folders: tuple[Path, Path],
        batch_size: int,
        num_golden: int,
    ) -> None:
        self._experiment, self._champion_path = experiment, champion
        self._folders, self._batch_size, self._num_golden = folders, batch_size, num_golden
        self._places: dict[str, Place] = {}
        self._last: tuple[str, Answers] | None = None
        self._wanted = cache(self._answer)

    def check(self, name: str) -> ArtifactReport:
        """The report of a check that ``check_names`` named."""
        part, form = name.split(".")
        if part == TOGETHER:
            return self._check_together(name, form)
        if form == "champion":
            report = self._check_champion(part)
        else:
            answers = self._answers(part)
            report = check_artifact(
                answers, form, formats()[form], self._places[part], Int8Limits()
            )
        report.format = name
        return report

    def _check_champion(self, part: str) -> ArtifactReport:
        champion = self._load(part)
        report = check_comparison(champion)
        write_golden(self._places[part].scratch / "golden", champion, self._num_golden)
        return report

    def _answers(self, part: str) -> Answers:
        """What artifacts of a part are held to, of one part at a time."""
        if self._last is None or self._last[0] != part:
            self._load(part)
        assert self._last is not None
        return self._last[1]

    def _load(self, part: str) -> Champion:
        """The champion of a part, of which the answers and the place are kept, and no model."""
        self._last = None
        path = self._champion_path
        alone, (bundle, scratch) = graph_of(self._experiment, part, path, self._folders)
        champion = Champion.load(alone, path, self._batch_size)
        self._last = part, champion.answers()
        self._places[part] = Place(bundle, scratch, alone.model, champion.interface)
        return champion

    def _place(self, part: str) -> Place:
        if part not in self._places:
            self._load(part)
        return self._places[part]

    def _answer(self) -> list[Mapping[str, Tensor]]:
        runs = eager_runs(self._experiment, self._champion_path)
        return self._all_assembled(runs)

    def _all_assembled(self, runs: Mapping[str, Runner]) -> list[Mapping[str, Tensor]]:
        answers = []
        with preserved_generators():
            for number, batch in enumerate(self._batches()):
                seed_scoring(number)
                answers.append(self._assembled(runs, batch))
        return answers

    def _batches(self) -> list[Batch]:
        return list(evaluation_batches(self._experiment.dataset("test"), self._batch_size))

    def _assembled(self, runs: Mapping[str, Runner], batch: Batch) -> Mapping[str, Tensor]:
        assert isinstance(self._experiment, InParts)
        with torch.no_grad():
            return self._experiment.assemble(runs, batch)

    def _check_together(self, name: str, form: str) -> ArtifactReport:
        report, wanted = ArtifactReport(name), self._wanted()
        try:
            runs = self._load_runs(form)
            found = self._all_assembled(runs)
        except Exception as error:  # noqa: BLE001 - runtimes raise anything; each is a finding
            report.add("runtime", "test set", f"{type(error).__name__}: {str(error)[:300]}")
            return report
        for record in wanted[0]:
            mine, its = (torch.cat([answer[record] for answer in all_]) for all_ in (wanted, found))
            if not mine.is_floating_point() and not torch.equal(mine, its):
                num = int((mine != its).flatten(1).any(1).sum())
                message = f"{num} of {len(mine)} samples differ from the champion's"
                report.add("together", record, message)
        self._compare_metrics(report, wanted, found)
        return report

    def _load_runs(self, form: str) -> dict[str, Runner]:
        parts = part_names(self._experiment)
        return {part: formats()[form].load(self._place(part)).run for part in parts}

    def _compare_metrics(
        self,
        report: ArtifactReport,
        wanted: Sequence[Mapping[str, Tensor]],
        found: Sequence[Mapping[str, Tensor]],
    ) -> None:
        both = [
            metrics_of(self._experiment, concatenate([as_arrays(answer) for answer in answers]))
            for answers in (wanted, found)
        ]
        for name, champion in both[0].items():
            artifact = both[1][name]
            report.metrics[name] = {"artifact": artifact, "champion": champion}
            if not math.isclose(artifact, champion, rel_tol=PRINTED):
                report.add("task", name, f"{artifact:.6g} instead of {champion:.6g}")
