"""Remaining useful life and health of jet engines, on NASA's C-MAPSS data.

Engines are split, never windows: windows of one engine overlap, and a random split of windows
tells a model's memory, not what it does with an engine that it has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from holdfast.training.configuration.schema import UNLESS_DEFAULT, Section, Split
from holdfast.training.errors import DataFormatError
from holdfast.training.experiment.protocol import Batch, Context, Records, example_inputs
from holdfast.training.experiments.turbofan.data import (
    SENSORS,
    Engines,
    read_given_engines,
    read_test_engines,
    read_training_engines,
    warn_of_shared,
    without_given,
)
from holdfast.training.experiments.turbofan.dataset import (
    SensorNoise,
    TurbofanDataset,
    blocks,
    cut_off,
)
from holdfast.training.experiments.turbofan.model import (
    TurbofanModel,
    fit_scaler,
    sensor_deviations,
)
from holdfast.training.export.specification import ExportSpec
from holdfast.training.reporting.figures import Measure, Panel, Series

HEALTHY_ABOVE = 80.0
CRITICAL_UP_TO = 30.0
HEALTH_CLASSES = ("healthy", "degrading", "critical")
NUM_SHOWN_ENGINES = 6


class TurbofanSettings(Section):
    """Settings of the turbofan experiment."""

    subset: Literal["FD001", "FD002", "FD003", "FD004"] = "FD001"
    """Part of the data: 1 and 3 have one operating condition, 2 and 4 six; 3 and 4 two faults."""
    window: int = Field(30, ge=2, le=1000)
    """Cycles that the model sees."""
    with_age: bool = False
    """Whether the number of each cycle is a feature, too, the last one: whoever asks the model has
    to know how long the engine has run."""
    rul_cap: float = Field(125.0, gt=0)
    """Remaining lives above this many cycles count as this many."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a feature, in all parts but the heads. It shifts a regression:
    trained with 0.4, the network is 25 cycles too low for healthy engines once dropout is off."""
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    """Fraction of the training engines that validate and are never trained on."""
    split_seed: int = Field(0, ge=0, lt=2**32)
    """Decides which engines validate; apart from the run's seed, so that runs can be compared."""
    validation_engines: tuple[int, ...] = Field((), json_schema_extra=UNLESS_DEFAULT)
    """Numbers of the training engines that validate, where somebody else fixed them; in place of
    the fraction."""
    validation_file: str | None = Field(None, json_schema_extra=UNLESS_DEFAULT)
    """Other engines that validate, in the place of training engines: a file of the training file's
    format in data.folder."""
    validation_rul_file: str | None = Field(None, json_schema_extra=UNLESS_DEFAULT)
    """Cycles that each of them still ran after its last row, one a line: they are then scored once,
    there, as test engines are. Unset: they ran until they failed."""
    test_file: str | None = Field(None, json_schema_extra=UNLESS_DEFAULT)
    """Test engines in the place of the subset's own, a file in data.folder; with test_rul_file."""
    test_rul_file: str | None = Field(None, json_schema_extra=UNLESS_DEFAULT)
    """Cycles that each of them still ran after its last row, one a line."""
    train_noise: float = Field(0.5, ge=0)
    """Standard deviation of normal noise that training adds to each sensor's reading, as a multiple
    of the sensor's own within its operating condition: few engines are easily learnt by heart."""
    train_offset: float = Field(0.0, ge=0)
    """The same of what training adds to all of a window's readings of a sensor: by their levels
    single engines can be told apart, and their lives learnt by heart."""
    train_stride: int = Field(20, ge=1)
    """An epoch takes one window, at a random place, from every so many cycles of an engine: the
    windows of neighbouring cycles are nearly the same. 1 takes all."""
    min_cycles: int = Field(15, ge=1)
    """Training windows end at this cycle or later; those before a full window are padded."""
    validation_windows: int = Field(10, ge=1)
    """Places at which each validation engine's history is cut off."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.test_file is None) != (self.test_rul_file is None):
            raise ValueError("test_file and test_rul_file are named together, or neither is")
        if self.validation_rul_file is not None and self.validation_file is None:
            raise ValueError("validation_rul_file belongs to a validation_file; name that, too")
        if self.validation_engines and self.validation_file is not None:
            raise ValueError("name validation_engines or validation_file, not both")
        return self


class Turbofan:
    """Predict remaining useful life (RUL) and health class from the last cycles of an engine."""

    Settings = TurbofanSettings
    defaults: ClassVar[dict[str, Any]] = {
        "data": {"batch_size": 32},
        "train": {"num_epochs": 120, "clip_norm": 1.0},
        "optimizer": {"name": "AdamW", "args": {"lr": 1e-3, "weight_decay": 1e-4}},
        "warmup": {"num_epochs": 10, "start_factor": 0.1},
        "scheduler": {
            "name": "ReduceLROnPlateau",
            "args": {"factor": 0.5, "patience": 30, "min_lr": 5e-6},
            "metric": "rmse",
        },
        "early_stopping": {"patience_epochs": 60},
        "ema": {"decays": [0.999]},
        "selection": {"metric": "rmse", "mode": "min"},
    }
    resampling_unit: ClassVar[str] = "engine"

    def __init__(self, context: Context) -> None:
        self._settings: TurbofanSettings = context.settings
        self._folder = context.data_folder

    @cached_property
    def _engines(self) -> tuple[Engines, Engines]:
        """Training engines, and validation engines.

        Of the test, no file is opened but a given one, to keep its engines out of training.
        """
        settings, test = self._settings, self._given_test
        train = read_training_engines(self._folder, settings.subset, should_have_test=test is None)
        given = [] if test is None else [test]
        if settings.validation_file is None:
            is_validation = self._is_validation(train)
            train, validation = train.chosen(~is_validation), train.chosen(is_validation)
        else:
            names = settings.validation_file, settings.validation_rul_file
            validation = read_given_engines(self._folder, *names)
            given.append(validation)
        if given:
            train = without_given(train, given)
        if test is not None:
            warn_of_shared(validation, test)
        return self._featured(train), self._featured(validation)

    @cached_property
    def _given_test(self) -> Engines | None:
        names = self._settings.test_file, self._settings.test_rul_file
        return None if names[0] is None else read_given_engines(self._folder, names[0], names[1])

    def _note(self) -> str:
        """For the model card: whose engines tested it."""
        name = self._settings.test_file
        return "" if name is None else f" Tested on the engines of {name}."

    def _is_validation(self, engines: Engines) -> npt.NDArray[np.bool_]:
        """Which of the training file's engines validate: those that are named, or a fraction."""
        settings, num = self._settings, len(engines.ids)
        if settings.validation_engines:
            return named_engines(engines, settings.validation_engines)
        # RandomState's streams are frozen by NumPy's compatibility policy.
        order = np.random.RandomState(settings.split_seed).permutation(num)
        num_validation = min(max(1, round(settings.validation_fraction * num)), num - 1)
        return np.isin(np.arange(num), order[:num_validation])

    def dataset(self, split: Split) -> TurbofanDataset:
        """Windows of a split.

        ``train``: windows of the training engines, their last cycles spread over whole lives, with
        ``train_noise`` and ``train_offset``.
        ``validation``: the validation engines' histories, each cut off at
        ``validation_windows`` places as the test engines' are cut off at one; given engines that
        were stopped before they failed, at their last cycle.
        ``test``: the window at each test engine's last cycle.
        """
        settings, noise = self._settings, None
        if split == "test":
            test = self._given_test
            if test is None:
                test = read_test_engines(self._folder, settings.subset)
            engines = self._featured(test)
            numbers, cycles = np.arange(len(engines.ids)), engines.lengths
            spread = np.ones_like(cycles)
        elif split == "validation":
            engines = self._engines[1]
            if settings.validation_rul_file is None:
                numbers, cycles = cut_off(engines, settings.validation_windows)
            else:
                numbers, cycles = np.arange(len(engines.ids)), engines.lengths
            spread = np.ones_like(cycles)
        else:
            engines = self._engines[0]
            numbers, cycles, spread = blocks(engines, settings.min_cycles, settings.train_stride)
            if settings.train_noise or settings.train_offset:
                deviations = sensor_deviations(engines.rows)
                noise = SensorNoise(deviations, settings.train_noise, settings.train_offset)
        return TurbofanDataset(engines, numbers, cycles, settings.window, spread, noise)

    def model(self) -> TurbofanModel:
        """The dual-task network, its scaler fitted to the training engines."""
        scaler = fit_scaler(self._engines[0].rows)
        return TurbofanModel(scaler, self._settings.dropout, self._settings.rul_cap)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Half the weighted squared error of RUL in cycles, half the cross entropy of health."""
        windows, (rul, _, _) = batch
        squared, entropy = self._errors(model(windows), rul)
        return (0.5 * squared + 0.5 * entropy).mean()

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Per window: ``loss``, ``prediction`` and ``target`` (RUL in cycles, not capped),
        ``health`` (probabilities [B, 3]), ``health_target``, ``engine``, ``cycle``.
        """
        windows, (rul, engine, cycle) = batch
        outputs = model(windows)
        squared, entropy = self._errors(outputs, rul)
        return {
            "loss": 0.5 * squared + 0.5 * entropy,
            "prediction": outputs[0].float().squeeze(1),
            "target": rul,
            "health": outputs[1].float().softmax(1),
            "health_target": health_class(rul),
            "engine": engine,
            "cycle": cycle,
        }

    def metrics(self, records: Records) -> dict[str, float]:
        """``rmse`` against capped and ``rmse_raw`` against raw RUL, in cycles; ``nasa_score``
        against raw and ``nasa_score_capped`` against capped RUL; ``health_accuracy``; ``loss``.

        A score is the sum over engines of the mean over an engine's windows; for the one window
        of each test engine that is NASA's sum.
        """
        predicted = records["prediction"].astype(np.float64)
        raw = records["target"].astype(np.float64)
        capped = np.minimum(raw, self._settings.rul_cap)
        _, engine = np.unique(records["engine"], return_inverse=True)
        weight = 1.0 / np.bincount(engine)[engine]
        is_right = records["health"].argmax(1) == records["health_target"]
        return {
            "rmse": float(np.sqrt(np.mean((predicted - capped) ** 2))),
            "rmse_raw": float(np.sqrt(np.mean((predicted - raw) ** 2))),
            "nasa_score": float(np.sum(weight * nasa_penalty(predicted - raw))),
            "nasa_score_capped": float(np.sum(weight * nasa_penalty(predicted - capped))),
            "health_accuracy": float(np.mean(is_right)),
            "loss": float(records["loss"].mean(dtype=np.float64)),
        }

    def figures(self, measure: Measure) -> tuple[Series]:
        """RUL over the whole lives of some validation engines, from the shortest to the longest."""
        settings, engines = self._settings, self._engines[1]
        num_shown = min(NUM_SHOWN_ENGINES, len(engines.ids))
        by_length = np.argsort(engines.lengths, kind="stable")
        chosen = by_length[np.linspace(0, len(by_length) - 1, num_shown).round().astype(np.int64)]
        lengths = engines.lengths[chosen]
        numbers = np.repeat(chosen, lengths)
        cycles = np.concatenate([np.arange(1, length + 1) for length in lengths])
        spread = np.ones_like(cycles)
        records = measure(TurbofanDataset(engines, numbers, cycles, settings.window, spread))
        return (
            Series(
                title=f"Remaining useful life over cycles, capped at {settings.rul_cap:g}",
                data=f"{num_shown} of {len(engines.ids)} validation engines, by length of life",
                x_label="cycle",
                y_label="remaining useful life (cycles)",
                panels=tuple(_panel(records, one, settings.rul_cap) for one in engines.ids[chosen]),
            ),
        )

    def export_spec(self) -> ExportSpec:
        """Names of what goes in and comes out, and windows that have to be padded."""
        (windows,) = example_inputs(self, num_samples=8)
        age = ", and the cycle's number from 1," if self._settings.with_age else ""
        padded = {f"padded-{num}": (_padded(windows, num),) for num in (1, windows.shape[1] // 2)}
        return ExportSpec(
            input_names=("windows",),
            output_names=("rul", "health"),
            class_names={"health": HEALTH_CLASSES},
            probes=padded,
            description=(
                "Remaining useful life in cycles and health class of a jet engine, from the raw "
                f"settings 1 to 3 and sensors {', '.join(map(str, SENSORS))}{age} of its last "
                f"{windows.shape[1]} cycles, oldest first; where there are fewer cycles, the "
                "first is repeated in front, as it is. The readings are standardised within the "
                f"model. Trained on C-MAPSS {self._settings.subset}; RUL is capped at "
                f"{self._settings.rul_cap:g} cycles.{self._note()}"
            ),
            task="tabular-regression",
        )

    def _featured(self, engines: Engines) -> Engines:
        return engines.with_age() if self._settings.with_age else engines

    def _errors(self, outputs: tuple[Tensor, Tensor], rul: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted squared error [B] and cross entropy [B]; errors at the end of life cost more."""
        cap = self._settings.rul_cap
        target = rul.clamp(max=cap)
        weight = 1 + (1 - target / cap).clamp(0, 1)
        squared = weight * (outputs[0].float().squeeze(1) - target).square()
        entropy = functional.cross_entropy(outputs[1].float(), health_class(rul), reduction="none")
        return squared, entropy


def named_engines(engines: Engines, numbers: Sequence[int]) -> npt.NDArray[np.bool_]:
    """The mask [E] of the engines of these numbers.

    Raises DataFormatError for a number that there is not, or where they are all engines.
    """
    unknown = sorted(set(numbers) - set(engines.ids.tolist()))
    if unknown:
        raise DataFormatError(
            f"experiment.validation_engines names engine {unknown[0]}; the training file has the "
            f"engines {engines.ids[0]} to {engines.ids[-1]}"
        )
    is_named: npt.NDArray[np.bool_] = np.isin(engines.ids, numbers)
    if is_named.all():
        raise DataFormatError(
            f"experiment.validation_engines names all {len(is_named)} engines of the training "
            "file; leave some to train on"
        )
    return is_named


def _panel(records: Records, engine: int, rul_cap: float) -> Panel:
    """One engine's RUL in cycles over its cycles; the truth is capped as training caps it."""
    own = records["engine"] == engine
    cycles = records["cycle"][own].tolist()
    truth = np.minimum(records["target"][own], rul_cap).tolist()
    return Panel(
        title=f"engine {engine}",
        truth=tuple(zip(cycles, truth, strict=True)),
        prediction=tuple(zip(cycles, records["prediction"][own].tolist(), strict=True)),
    )


def _padded(windows: Tensor, num_cycles: int) -> Tensor:
    """The windows of engines that have run for only so many cycles."""
    padded = windows.clone()
    padded[:, :-num_cycles] = windows[:, -num_cycles, None]
    return padded


def health_class(rul: Tensor) -> Tensor:
    """0 healthy above 80 cycles, 1 degrading, 2 critical up to 30 cycles."""
    return (rul <= HEALTHY_ABOVE).long() + (rul <= CRITICAL_UP_TO).long()


def nasa_penalty(error: Any) -> Any:
    """Saxena et al. 2008: exp(-d/13) - 1 for early, exp(d/10) - 1 for late predictions.

    ``error`` is predicted minus true cycles. Finite for any error: capped at 1000 cycles.
    """
    error = np.clip(error, -1000.0, 1000.0)
    return np.expm1(np.where(error < 0, -error / 13, error / 10))
