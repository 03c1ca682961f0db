from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tests.faults.hard_experiment import Hard, HardSettings
from training.evaluation import evaluate
from training.experiment import Batch, Context
from training.seeding import capture_generators, seed_generators


class Drawing(Hard):
    """Scores with draws from all generators, as careless user code does."""

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        random.random()
        np.random.rand()
        torch.rand(3)
        return super().score(model, batch)


def experiment() -> Drawing:
    return Drawing(Context(settings=HardSettings()))


def test_evaluation_leaves_no_trace_on_generators_modes_and_buffers() -> None:
    seed_generators(3)
    subject = experiment()
    model = subject.model()
    model.train()
    model[1].eval()  # a frozen batch norm
    before = capture_generators()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert evaluate(subject, model, subject.dataset("validation"), batch_size=16) is not None
    after = capture_generators()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model][:3] == [True, False, True]


def test_records_do_not_depend_on_the_batch_size() -> None:
    seed_generators(3)
    subject = experiment()
    model = subject.model()
    dataset = subject.dataset("validation")
    small = evaluate(subject, model, dataset, batch_size=7)
    large = evaluate(subject, model, dataset, batch_size=64)
    assert small is not None
    assert large is not None
    assert np.array_equal(small["is_correct"], large["is_correct"])
    assert len(small["loss"]) == len(dataset)


def test_evaluation_stops_between_batches_when_a_notice_comes() -> None:
    subject = experiment()
    model = subject.model()
    answers = iter([False, False, True])
    records = evaluate(
        subject,
        model,
        subject.dataset("validation"),
        batch_size=8,
        should_stop=lambda: next(answers),
    )
    assert records is None
