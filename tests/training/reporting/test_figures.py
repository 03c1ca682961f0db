"""What the experiments offer for their reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from holdfast.training.experiment.protocol import Context, Dataset, Experiment, Records
from holdfast.training.experiments.digits import Digits, DigitsSettings
from holdfast.training.experiments.turbofan.experiment import Turbofan, TurbofanSettings
from holdfast.training.experiments.turbofan.synthetic import Fleet, write_fleet
from holdfast.training.loop.evaluation import evaluate
from holdfast.training.reporting.figures import Measure, count_confusions, experiment_figures


def measure_with(experiment: Experiment) -> Measure:
    model: nn.Module = experiment.model()

    def measure(dataset: Dataset) -> Records:
        records = evaluate(experiment, model, dataset, batch_size=256)
        assert records is not None
        return records

    return measure


def test_confusions_are_counted_by_true_and_predicted_class() -> None:
    counts = count_confusions(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), 3)
    assert counts == ((1, 1, 0), (0, 2, 0), (0, 0, 0))


def test_digits_offers_a_confusion_matrix_of_all_validation_images() -> None:
    digits = Digits(Context(settings=DigitsSettings()))
    (figure,) = digits.figures(measure_with(digits))
    assert sum(map(sum, figure.counts)) == len(digits.dataset("validation"))


def test_turbofan_offers_whole_lives_of_validation_engines(tmp_path: Path) -> None:
    write_fleet(tmp_path, Fleet(num_train=10, num_test=2, shortest_life=50, longest_life=90))
    (tmp_path / "test_FD001.txt").write_text("not opened")
    turbofan = Turbofan(Context(settings=TurbofanSettings(), data_folder=tmp_path))
    (figure,) = turbofan.figures(measure_with(turbofan))
    assert 1 <= len(figure.panels) <= 6
    for panel in figure.panels:
        assert [x for x, _ in panel.truth] == list(range(1, len(panel.truth) + 1))
        assert panel.truth[-1][1] == 0
        assert max(y for _, y in panel.truth) <= 125
        assert len(panel.prediction) == len(panel.truth)


def test_an_experiment_without_figures_has_none() -> None:
    assert experiment_figures(object(), lambda _: {}) == ()
