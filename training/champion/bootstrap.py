"""What chance does to metrics: units of a test set drawn again with replacement.

The percentile bootstrap of Efron and Tibshirani (1993). A unit is a sample, or all samples that an
experiment's ``resampling_unit`` record has one value for: an engine, whose windows are not
independent of each other. Several models get the same draws, so that the spread of the differences
of their metrics is that of a paired comparison.

A unit that was drawn twice counts as two units: its copies get numbers of their own in the unit's
record, so that metrics which count by unit see as many units as there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holdfast.training.data.permutation import Int64Array
from holdfast.training.errors import ExperimentError, SelectionError
from holdfast.training.experiment.protocol import Experiment, Records

CONFIDENCE = 0.95
Resampled = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A figure and the limits between which it lies with ``CONFIDENCE``; None: not finite."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is ruled out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Units:
    """The units of a data set, and which of its samples belong to each.

    Attributes:
        record: what tells units apart; None where each sample is one.
        order: numbers of the samples, unit by unit.
        starts: for each unit, where its samples begin in ``order``.
        counts: for each unit, how many samples it has.
    """

    record: str | None
    order: Int64Array
    starts: Int64Array
    counts: Int64Array

    def __len__(self) -> int:
        return len(self.counts)

    def draws(self, num_resamples: int, seed: int) -> Iterator[tuple[Int64Array, Int64Array]]:
        """For each resample the numbers of its samples, and for each sample the unit's new one."""
        # RandomState's streams are frozen by NumPy's compatibility policy; default_rng's are not.
        random = np.random.RandomState(np.random.MT19937(seed))
        for _ in range(num_resamples):
            drawn = random.randint(0, len(self), len(self), dtype=np.int64)
            counts = self.counts[drawn]
            ends = counts.cumsum()
            place = np.arange(ends[-1]) + np.repeat(self.starts[drawn] - ends + counts, counts)
            yield self.order[place], np.repeat(np.arange(len(self)), counts)


def units_of(experiment: Experiment, records: Records) -> Units:
    """The units that the experiment names in its ``resampling_unit``.

    Raises:
        SelectionError: there are no samples.
        ExperimentError: there is no such record, or it has not one value per sample.
    """
    num_samples = len(next(iter(records.values())))
    if num_samples == 0:
        raise SelectionError("the data set has no samples: there is nothing to resample")
    name: str | None = getattr(experiment, "resampling_unit", None)
    if name is None:
        every = np.arange(num_samples)
        return Units(None, every, every, np.ones(num_samples, dtype=np.int64))
    if name not in records or records[name].ndim != 1:
        found = {key: list(values.shape) for key, values in records.items()}
        raise ExperimentError(
            f"resampling_unit = {name!r} must name a record with one value per sample; score() "
            f"returned {found}"
        )
    _, unit, counts = np.unique(records[name], return_inverse=True, return_counts=True)
    order = np.argsort(unit.reshape(-1), kind="stable")
    return Units(name, order, counts.cumsum() - counts, counts)


def resampled_metrics(
    experiment: Experiment,
    records: Sequence[Records],
    *,
    num_resamples: int,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Resampled] | None:
    """Metrics of each of the models for every resample, [num_resamples] each.

    The records are of one data set, and every model gets the same draws. The metrics are those of
    ``experiment.metrics`` for the records that were drawn. None where ``should_stop`` said so.
    """
    units = units_of(experiment, records[0])
    found: list[list[dict[str, float]]] = [[] for _ in records]
    for chosen, unit in units.draws(num_resamples, seed):
        if should_stop():
            return None
        for one, metrics in zip(records, found, strict=True):
            drawn = {name: values[chosen] for name, values in one.items()}
            if units.record is not None:
                drawn[units.record] = unit
            metrics.append(experiment.metrics(drawn))
    return [
        {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
        for rows in found
    ]


def unknown_spread(metrics: Sequence[Mapping[str, float]]) -> list[Resampled]:
    """In the place of ``resampled_metrics`` of one unit, which says nothing of chance."""
    return [{name: np.array([math.nan]) for name in one} for one in metrics]


def interval(value: float | None, resampled: npt.NDArray[np.float64]) -> Interval:
    """The percentile interval of a figure; without limits where a resample is not finite."""
    if not np.isfinite(resampled).all():
        return Interval(finite(value), None, None)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(np.quantile(resampled, q)) for q in (tail, 1 - tail))
    return Interval(finite(value), low, high)


def finite(value: float | None) -> float | None:
    """The value; None where it is NaN or infinite, which JSON does not have."""
    return float(value) if value is not None and math.isfinite(value) else None
