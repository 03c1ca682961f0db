"""What an experiment returns that it must not: one clear line, before hours are spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast.training.averages.ema import MovingAverages
from holdfast.training.configuration.schema import (
    EmaConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
    WarmupConfig,
)
from holdfast.training.data.loader import Microbatch
from holdfast.training.errors import ExperimentError
from holdfast.training.experiment.protocol import Batch, Context, Records
from holdfast.training.loop.evaluation import evaluate, metrics_of
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.train_step import TrainStep, gradient_scaler
from holdfast.training.optimizers.building import CONFIGURED, build_optimizer
from holdfast.training.optimizers.schedule import Schedule
from tests.faults.hard_experiment import Hard, HardSettings


class Returning(Hard):
    """Scores and measures what it is given; ``rows`` may depend on the batch."""

    def __init__(self, scored: Any = None, metrics: Any = None) -> None:
        super().__init__(Context(settings=HardSettings()))
        self._scored = scored
        self._metrics = metrics

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        scored: Mapping[str, Tensor] = self._scored(len(batch[1]))
        return scored

    def metrics(self, records: Records) -> dict[str, float]:
        found: dict[str, float] = self._metrics
        return found


def scored(returned: Any) -> Records | None:
    subject = Returning(returned)
    return evaluate(subject, subject.model(), subject.dataset("validation"), batch_size=40)


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda _: {"loss": torch.zeros(())}, r"'loss' is a tensor of shape \[\]"),
        (lambda num: {"loss": np.zeros(num)}, r"'loss' is a NumPy array of shape \[40\]"),
        (lambda num: {"loss": [0.0] * num}, "'loss' is of type list"),
        (
            lambda num: {"loss": torch.zeros(num), "hit": torch.zeros(num - 1)},
            r"\[40, \.\.\.\] for this batch; 'hit' is a tensor of shape \[39\]",
        ),
        (lambda _: {}, r"it returned \{\}"),
        (lambda _: None, "it returned None"),
        (torch.zeros, r"it returned a tensor of shape \[40\]"),
    ],
)
def test_a_score_that_has_not_one_row_per_sample_is_refused(returned: Any, found: str) -> None:
    with pytest.raises(ExperimentError, match=rf"Returning\.score must return .*{found}") as caught:
        scored(returned)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "later", [lambda num: {"rows": torch.zeros(num, num)}, lambda num: {str(num): torch.ones(num)}]
)
def test_batches_whose_records_do_not_fit_together_are_refused(later: Any) -> None:
    with pytest.raises(ExperimentError, match=r"the same records for every batch.*pad ragged rows"):
        scored(later)


def test_a_score_in_bfloat16_is_kept_in_fp32() -> None:
    records = scored(lambda num: {"loss": torch.full((num,), 0.5, dtype=torch.bfloat16)})
    assert records is not None
    assert records["loss"].dtype == np.float32
    assert (records["loss"] == 0.5).all()


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (None, "returned None"),
        ([0.5], "returned of type list"),
        ({"loss": "low"}, "'loss' is 'low'"),
        ({"loss": None}, "'loss' is None"),
        ({"loss": np.zeros(3)}, r"'loss' is a NumPy array of shape \[3\]"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(returned: Any, found: str) -> None:
    with pytest.raises(ExperimentError, match=rf"Returning\.metrics must return .*{found}"):
        metrics_of(Returning(metrics=returned), {})


def test_metrics_may_be_scalars_of_any_library() -> None:
    found = metrics_of(
        Returning(metrics={"a": np.float32(0.5), "b": torch.tensor(2), "c": True, "d": 3}), {}
    )
    assert found == {"a": 0.5, "b": 2.0, "c": 1.0, "d": 3.0}
    assert all(type(value) is float for value in found.values())


def state_of(model: nn.Module) -> TrainState:
    optimizer = build_optimizer(OptimizerConfig(), model)
    return TrainState(
        model=model,
        optimizers={CONFIGURED: optimizer},
        schedule=Schedule({CONFIGURED: optimizer}, SchedulerConfig(), WarmupConfig(), 1),
        averages=MovingAverages(model, EmaConfig()),
        gradient_scaler=gradient_scaler(TrainConfig(), torch.device("cpu")),
        loss_sum=torch.zeros((), dtype=torch.float64),
    )


def test_a_loss_that_is_cut_off_from_the_model_is_refused() -> None:
    class Detached(Returning):
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            return super().loss(model, batch).detach()

    subject = Detached()
    step = TrainStep(subject, TrainConfig(), state_of(subject.model()), torch.device("cpu"))
    dataset = subject.dataset("train")
    items = [dataset[index] for index in range(4)]
    batch = (torch.stack([one for one, _ in items]), torch.stack([two for _, two in items]))
    with pytest.raises(ExperimentError, match=r"Detached\.loss must .* has a gradient.*\.detach"):
        step([Microbatch(0, 0, 0, 1, 4, 4, batch)])
