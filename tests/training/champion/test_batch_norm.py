"""Recomputed statistics: those of the data, the same every time, and without a trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from holdfast.training.champion.batch_norm import recompute_batch_norm
from holdfast.training.exactness.seeding import capture_generators


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        nn.Linear(8, 4),
        nn.BatchNorm1d(4, momentum=0.3),
        nn.BatchNorm1d(4, track_running_stats=False),
    )


def batches() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(num, 3, generator=generator),) for num in (16, 16, 7)]


def test_the_statistics_are_those_of_torch_without_dropout() -> None:
    subject, reference = model(), model()
    found = recompute_batch_norm(subject, batches())
    reference[2].p = 0.0  # type: ignore[assignment]
    update_bn([inputs for (inputs,) in batches()], reference)
    expected = reference.state_dict()
    assert found.keys() == {name for name in expected if "running" in name or "num_b" in name}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(torch.equal(subject.state_dict()[name], found[name]) for name in found)


def test_nothing_else_changes_and_nothing_is_drawn() -> None:
    subject = model()
    subject.train()
    subject[1].eval()
    before, generators = (
        {k: v.clone() for k, v in subject.state_dict().items()},
        capture_generators(),
    )
    first = recompute_batch_norm(subject, batches())
    after = capture_generators()
    assert all(torch.equal(generators[name], after[name]) for name in generators)
    assert [module.training for module in subject] == [True, False, True, True, True, True]
    assert (subject[1].momentum, subject[4].momentum) == (0.1, 0.3)
    changed = {k for k, v in subject.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == first.keys()
    again = recompute_batch_norm(subject, batches())
    assert all(torch.equal(first[name], again[name]) for name in first)
