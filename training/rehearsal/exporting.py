"""Every format that is asked for, from weights that are hardly trained, with a handful of samples.

Whether a model can be exported at all does not depend on its training. How near an artifact comes
to it may, so differences between numbers are no errors here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.training.configuration.schema import ExportConfig
from holdfast.training.errors import ExportError
from holdfast.training.exactness.seeding import preserved_generators
from holdfast.training.experiment.error_places import users_place
from holdfast.training.export.artifacts import open_champion
from holdfast.training.export.capturing import unused_tensors
from holdfast.training.export.formats import formats
from holdfast.training.export.parts import part_names, write_parts
from holdfast.training.parity.assembly import PartChecks, check_names
from holdfast.training.parity.champion import Champion
from holdfast.training.parity.merging import merged_experiment, write_exported
from holdfast.training.parity.parity import (
    ArtifactReport,
    Finding,
    Int8Limits,
    check_artifact,
    check_comparison,
)
from holdfast.training.rehearsal.few_rows import of_few_rows
from holdfast.training.rehearsal.telling import COLOUR

if TYPE_CHECKING:
    from holdfast.training.rehearsal.trial import Trial

BATCH_SIZE = 8
NOISE = 0.05
MAX_MESSAGE_CHARS = 300
OF_TRAINING = ("numbers", "task", "agreement", "together", "sensitivity")
"""Checks whose outcome may be another one once the model is trained."""


class Exporting:
    """The exports of a trial."""

    def __init__(self, trial: Trial, config: ExportConfig) -> None:
        self._trial, self._config = trial, config
        folder = Path(trial.request.folder)
        self._folders = folder / "bundle", folder / "scratch"
        self._champion_path = folder / "champion.safetensors"
        self._made: list[str] = []

    def open(self) -> None:
        """Inputs and outputs, and whether a comparison of outputs could fail at all."""
        self._trained = of_few_rows(self._trial.stage.experiment)
        self._experiment = merged_experiment(self._trained)
        weights = self._trial.saved.tensors["model"]
        self._load(weights)
        report = check_comparison(self._champion)
        if report.findings:  # weights that begin with zero are not yet weights
            self._load(_noisy(weights))
            report = check_comparison(self._champion)
        self._tell("champion", report)

    def act(self, name: str) -> Callable[[], None]:
        """What tries one format."""
        return lambda: self._try(name)

    def try_parts(self) -> None:
        """The parts of a model that is served as several graphs, in the formats that worked."""
        if not part_names(self._experiment):
            return
        write_parts(self._experiment, self._champion_path, self._config, self._folders, self._made)
        checks = PartChecks(self._experiment, self._champion_path, self._folders, BATCH_SIZE, 2)
        for name in check_names(self._experiment, self._made):
            self._tell(name, checks.check(name))

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        config = self._trial.stage.config.checkpoint
        self._champion_path = write_exported(
            self._trained, weights, config, None, self._champion_path.parent
        )
        self._source, self._place = open_champion(
            self._experiment, self._champion_path, self._config, *self._folders
        )
        self._champion = Champion.load(self._experiment, self._champion_path, BATCH_SIZE)

    def _try(self, name: str) -> None:
        form = formats()[name]
        try:
            form.write(self._source, self._place)
            (self._place.scratch / "unused.txt").write_text("\n".join(self._unused()))
            report = check_artifact(self._champion, name, form, self._place, Int8Limits())
        except ExportError as error:
            place = users_place(error.__cause__ or error)
            where = f" ({place})" if place else ""
            raise ExportError(f"{_essence(error)}{where}{way_out(name, self._config)}") from error
        self._made.append(name)
        self._tell(name, report)

    def _unused(self) -> list[str]:
        """Tensors that the graph does not use; none where there is no graph, as its format says."""
        try:
            return sorted(unused_tensors(self._source.program))
        except ExportError:
            return []

    def _tell(self, name: str, report: ArtifactReport) -> None:
        """One finding for each check that failed."""
        by_check: dict[str, list[Finding]] = {}
        for finding in report.findings:
            by_check.setdefault(finding.check, []).append(finding)
        for check, found in by_check.items():
            more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
            message = f"{str(found[0])[:MAX_MESSAGE_CHARS]}{more}"
            if check in OF_TRAINING:
                if name != "onnx_int8":
                    note = f"{message}; the model is hardly trained, so this may change"
                    self._trial.telling.find("note", note)
                continue
            self._trial.telling.find("error", f"{message}{way_out(name, self._config)}")


def _essence(error: ExportError) -> str:
    """What failed, without the advice to the makers of the exporter that torch adds."""
    if error.__cause__ is None:
        return " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
    cause = COLOUR.sub("", str(error.__cause__))
    _, mark, summary = cause.partition("Exception summary")
    text = " ".join((summary if mark else cause).split())
    head = str(error).partition(":")[0]
    return f"{head}: {text}"[:MAX_MESSAGE_CHARS]


def way_out(name: str, config: ExportConfig) -> str:
    """What to do about a format that cannot be made."""
    others = [form for form in config.formats if form != name]
    if name == "champion":
        return (
            "; an output that does not vary proves nothing: give it samples over which it does, or "
            "leave it out of what forward() returns"
        )
    if name not in config.formats:
        return "; change the model: every bundle holds this format"
    return f"; change the model, or leave it out: export.formats={others}"


def _noisy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as training might make them: none of them zero, no two of them the same."""
    noisy: dict[int, Tensor] = {}  # tied tensors stay tied
    with preserved_generators():
        torch.manual_seed(0)
        for tensor in weights.values():
            if tensor.is_floating_point() and id(tensor) not in noisy:
                noisy[id(tensor)] = tensor + NOISE * torch.rand_like(tensor)
    return {name: noisy.get(id(tensor), tensor) for name, tensor in weights.items()}
