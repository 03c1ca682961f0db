"""What an experiment shows in its report: predictions against truth, as plain data.

An experiment may have one more method::

    def figures(self, measure: Measure) -> Sequence[Figure]

``measure(dataset)`` gives the champion's records on any data set of the experiment's choice, as
``score`` returns them. Figures illustrate and decide nothing; take validation data for them, since
test data is read once, after the choice. ``data`` of a figure says on the page what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holdfast.training.experiment.protocol import Dataset, Records

Measure = Callable[[Dataset], Records]
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Confusion:
    """How often each class was taken for which: ``counts[true class][predicted class]``."""

    title: str
    data: str
    class_names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Panel:
    """Truth and prediction of one sequence, as (x, y) in ascending x."""

    title: str
    truth: Points
    prediction: Points


@dataclass(frozen=True)
class Series:
    """Several sequences with axes of the same meaning."""

    title: str
    data: str
    x_label: str
    y_label: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Sentence:
    """A source, how a person put it, and how the model did."""

    source: str
    reference: str
    output: str


@dataclass(frozen=True)
class Sentences:
    """Texts with what the model made of them."""

    title: str
    data: str
    rows: tuple[Sentence, ...]


Figure = Confusion | Series | Sentences


def count_confusions(
    true: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], num_classes: int
) -> tuple[tuple[int, ...], ...]:
    """The counts of a ``Confusion``, from classes [N] and predicted classes [N]."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (true, predicted), 1)
    return tuple(tuple(int(count) for count in row) for row in counts)


def experiment_figures(experiment: object, measure: Measure) -> Sequence[Figure]:
    """The figures that an experiment offers; none where it has no such method."""
    own = getattr(experiment, "figures", None)
    return () if own is None else tuple(own(measure))
