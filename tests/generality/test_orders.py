"""The order of an epoch: told the epoch, weighted, sequential, growing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.faults.campaign import Training, complete, differences, final_state
from tests.generality.harness import assert_exact

NUM = 96


class Points:
    """Inputs that know their number."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(3)
        self.values = torch.randn(NUM, 5, generator=draws)

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Any:
        return self.values[index], index


class Base:
    """Learns to tell a sum."""

    data: type[Points] = Points
    defaults: Mapping[str, Any] = {
        "train": {"num_epochs": 6},
        "data": {"batch_size": 12},
        "optimizer": {"args": {"lr": 0.01}},
        "warmup": {"num_epochs": 2},
        "ema": {"decays": [0.9]},
    }

    def __init__(self, context: Any) -> None:
        pass

    def dataset(self, split: str) -> Any:
        return self.data() if split == "train" else Points()

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.score(model, batch)["loss"].mean()

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": mse_loss(model(batch[0])[:, 0], batch[0].sum(1), reduction="none")}

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


class Harder(Points):
    """Noise that falls from epoch to epoch, and is drawn anew in each."""

    def set_epoch(self, epoch: int) -> None:
        self.noise = torch.randn(NUM, 5) / (1 + epoch)

    def __getitem__(self, index: int) -> Any:
        return self.values[index] + self.noise[index], index


class Curriculum(Base):
    data = Harder


class WeightedPoints(Points):
    def weights(self, epoch: int) -> Any:
        return self.values.abs().sum(1) * (torch.arange(NUM) % (2 + epoch) == 0)


class Weighted(Base):
    data = WeightedPoints


class InOrder(Points):
    def order(self, epoch: int) -> Any:
        return range(NUM)


class Sequential(Base):
    """Samples come as they stand in the data set."""

    data = InOrder

    def loss(self, model: nn.Module, batch: Any, at: Any) -> Tensor:
        assert batch[1].tolist() == list(range(12 * at.step_in_epoch, 12 * at.step_in_epoch + 12))
        return super().loss(model, batch)


class ByHardness(Points):
    """The easiest third, then two thirds, then all, each shuffled by the epoch."""

    def order(self, epoch: int) -> Any:
        easiest = self.values.square().sum(1).argsort()
        kept = easiest[: NUM * min(epoch + 1, 3) // 3]
        return kept[torch.randperm(len(kept))]


class Growing(Base):
    data = ByHardness


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Curriculum", "Weighted", "Sequential", "Growing"])
def test_an_order_of_one_s_own_is_exact(name: str, tmp_path: Path) -> None:
    experiment = f"{__file__}:{name}"
    run = assert_exact(experiment, tmp_path)
    if name == "Growing":  # 32, 64, then 96 samples in batches of 12
        assert run.checkpoint(3 + 6 + 4 * 8).is_dir()


@pytest.mark.slow
def test_loader_processes_are_told_the_epoch_too(tmp_path: Path) -> None:
    experiment = f"{__file__}:Curriculum"
    runs = [
        Training(tmp_path, f"with-{num}", experiment, (f"data.num_workers={num}",))
        for num in (0, 2)
    ]
    for training in runs:
        complete(training)
    assert differences(*(final_state(training.run) for training in runs)) == []


class Shrinking(Points):
    num = NUM

    def set_epoch(self, epoch: int) -> None:
        self.num = NUM - 24 * epoch

    def __len__(self) -> int:
        return self.num


class Shrinks(Base):
    data = Shrinking


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_length_that_changes_is_refused_in_one_line(num_workers: int, tmp_path: Path) -> None:
    overrides = (f"data.num_workers={num_workers}", "checkpoint.every_steps=3")
    training = Training(tmp_path, "one", f"{__file__}:Shrinks", overrides)
    segment = training.start()
    assert segment.finish() == 2
    assert "set_epoch(1) of Shrinking changed its length from 96 to 72" in segment.errors[-1]
    assert training.run.checkpoint(6).is_dir()  # nothing was lost
