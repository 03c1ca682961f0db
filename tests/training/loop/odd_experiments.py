"""Small experiments that do what people do: each goes wrong, or is odd, in one way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from holdfast.training.experiment.protocol import Context, Records


class Plain:
    """Two classes of six numbers."""

    num_train = 64
    defaults: ClassVar[dict[str, Any]] = {
        "train": {"num_epochs": 2},
        "data": {"batch_size": 8},
        "optimizer": {"args": {"lr": 0.01}},
        "ema": {"decays": [0.9]},
        "preemption": {"sources": []},
        "selection": {"num_bootstrap": 100},
    }

    def __init__(self, context: Context) -> None:
        self.num_calls = 0

    def dataset(self, split: str) -> Any:
        number = ["train", "validation", "test"].index(split)
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(number))
        num = self.num_train if split == "train" else 64
        return TensorDataset(x[:num], (x[:num, 0] > 0).long())

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.num_calls += 1
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        logits = model(batch[0])
        return {"loss": cross_entropy(logits, batch[1], reduction="none")}

    def metrics(self, records: Records) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


class InfiniteSlope(Plain):
    """A loss that is finite, and whose gradient is not, at call 13."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        gap = (loss.detach() - loss) * 0.0
        return loss + gap.sqrt() if self.num_calls == 13 else loss


class Overflowing(Plain):
    """Weights that leave what fp32 can hold, without a bad gradient."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        if self.num_calls == 5:
            with torch.no_grad():
                model[2].bias[0] = torch.inf  # type: ignore[index, union-attr]
        return loss


class BadMomentum(Plain):
    """An optimizer whose state leaves what fp32 can hold, while the weights stay."""

    def model(self) -> nn.Module:
        self.built = super().model()
        return self.built

    def score(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        import gc

        if self.num_calls == 8:  # the end of the first epoch
            for found in gc.get_objects():
                if type(found) is torch.optim.AdamW:
                    for state in found.state.values():
                        state["exp_avg_sq"].fill_(torch.inf)
        return super().score(model, batch)


class Unfreezing(Plain):
    """Trains its last layer alone for six steps."""

    def model(self) -> nn.Module:
        model = super().model()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self.num_calls == 6:
            model[0].requires_grad_(True)  # type: ignore[index]
        return super().loss(model, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"num_calls": self.num_calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_calls = state["num_calls"]


class Counting(Unfreezing):
    """Scores by what it has counted while training."""

    def model(self) -> nn.Module:
        return Plain.model(self)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return Plain.loss(self, model, batch)

    def score(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        found = super().score(model, batch)
        return {**found, "calls": torch.full((len(batch[1]),), float(self.num_calls))}

    def metrics(self, records: Records) -> dict[str, float]:
        return {**super().metrics(records), "calls": float(records["calls"].mean())}


class OneLeft(Plain):
    """57 samples in batches of eight leave one for batch norm."""

    num_train = 57

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class SparseGradients(Plain):
    """An embedding with sparse gradients."""

    def dataset(self, split: str) -> Any:
        data = super().dataset(split)
        return TensorDataset(data.tensors[0].abs().long(), data.tensors[1])

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(18, 2))


class NothingToValidate(Plain):
    """Has no validation data."""

    def dataset(self, split: str) -> Any:
        data = super().dataset(split)
        return TensorDataset(*(t[:0] for t in data.tensors)) if split == "validation" else data


class TooLarge(Plain):
    """Wants more memory than any machine has, in its third step."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self.num_calls == 2:
            torch.empty(2**55, dtype=torch.uint8)
        return super().loss(model, batch)


class Lazy(Plain):
    """A layer whose shape is found in the first forward pass."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))


class LazyButRun(Lazy):
    """The same, run once where it is built."""

    def model(self) -> nn.Module:
        model = super().model()
        model(torch.zeros(2, 6))
        return model
