"""Small experiments, each with one thing that a rehearsal should find, or should leave alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from holdfast.training.configuration.schema import Split
from holdfast.training.experiment.protocol import Batch, Context, Records

GLOBAL_GENERATOR = np.random.default_rng(3)
GLOBAL_COUNTS = {"calls": 0}


class Plain:
    """Nothing is wrong with it."""

    num: ClassVar[dict[Split, int]] = {"train": 40, "validation": 24, "test": 24}
    defaults: ClassVar[dict[str, Any]] = {
        "train": {"num_epochs": 2},
        "data": {"batch_size": 8},
        "ema": {"decays": [0.9]},
    }

    def __init__(self, context: Context) -> None:
        self.table = torch.linspace(0, 1, 6)

    def dataset(self, split: Split) -> Any:
        generator = torch.Generator().manual_seed(len(split))
        points = torch.randn(self.num[split], 6, generator=generator)
        return TensorDataset(points, (points[:, 0] > 0).long())

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": cross_entropy(model(batch[0]), batch[1], reduction="none")}

    def metrics(self, records: Records) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


class Filled(Plain):
    """Trains where reading what nobody has written would show."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert torch.empty(1000).isnan().all()
        return super().loss(model, batch)


def first(layer: nn.Module) -> nn.Module:
    """A model that begins with a layer."""
    return nn.Sequential(layer, nn.Linear(6, 2))


# What a resume would lose.


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))  # type: ignore[operator]
        return x / self.scale  # type: ignore[operator]


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.draws = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.draws) if self.training else x


class Carried(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 6)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.cell(x)  # type: ignore[no-any-return]
        hidden = torch.zeros_like(x) if self.hidden is None else self.hidden[: len(x)]
        out: Tensor = self.cell(x, hidden)
        self.hidden = out.detach()
        return out


class BufferLeftOut(Plain):
    def model(self) -> nn.Module:
        return first(Scale())


class OwnGenerator(Plain):
    def model(self) -> nn.Module:
        return first(Noise())


class CarriedState(Plain):
    def model(self) -> nn.Module:
        return first(Carried())


class Counter(Plain):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.num_calls = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.num_calls += 1
        return super().loss(model, batch) / self.num_calls


class Adversary(Plain):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.critic = nn.Linear(2, 1)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), lr=0.1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        out = model(batch[0])
        critique = self.critic(out.detach()).mean()
        self.optimizer.zero_grad()
        critique.backward()
        self.optimizer.step()
        return cross_entropy(out, batch[1]) + self.critic(out).mean()


class GlobalDraws(Plain):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * float(GLOBAL_GENERATOR.uniform(0.5, 1.0))


class GlobalCount(Plain):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        GLOBAL_COUNTS["calls"] += 1
        return super().loss(model, batch) / GLOBAL_COUNTS["calls"]


class NewWeights(Plain):
    def model(self) -> nn.Module:
        model = first(nn.Identity())
        draws = np.random.default_rng()
        nn.init.constant_(model[1].weight, float(draws.random()))  # type: ignore[index]
        return model


class LateGenerator(Plain):
    """Its draws are kept for later: no byte of the first steps shows them."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.draws = np.random.default_rng(1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.draws.random()
        return super().loss(model, batch)


class Rows(TensorDataset):
    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.draws = np.random.default_rng(5)
        self.num_fetched = 0


class NoisyRows(Rows):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + float(self.draws.normal()), y


class CountedRows(Rows):
    def __getitem__(self, index: int) -> Any:
        self.num_fetched += 1
        x, y = super().__getitem__(index)
        return x * self.num_fetched, y


class DataDraws(Plain):
    rows: type[Rows] = NoisyRows

    def dataset(self, split: Split) -> Any:
        whole = super().dataset(split)
        return self.rows(*whole.tensors) if split == "train" else whole


class DataCounts(DataDraws):
    rows = CountedRows


# What cannot be saved, restored, or computed the same twice.


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.detach().mean(0)
        return x - self.mean


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"seen": 1}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"seen": 1}


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
        return gradients[0]


class LateBuffer(Plain):
    def model(self) -> nn.Module:
        return first(Late())


class ExtraState(Plain):
    def model(self) -> nn.Module:
        return first(Extra(6, 6))


class HoldsASet(Plain):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": {1, 2}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Forgetful(Plain):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.num_calls = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.num_calls += 1
        return super().loss(model, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"num_calls": self.num_calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Nondeterministic(Plain):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
        return super().loss(model, batch)


class NondeterministicBackwards(Plain):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(Backwards.apply(model(batch[0])), batch[1])  # type: ignore[no-untyped-call]


# As an operator of a library has it: no line of its way back is the user's.
HIDDEN: dict[str, Any] = {"torch": torch, "Backwards": Backwards}
exec(
    compile(
        "class InLibrary(Backwards):\n"
        "    @staticmethod\n"
        "    def backward(ctx, gradient):\n"
        "        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))\n",
        "<library>",
        "exec",
    ),
    HIDDEN,
)


class NondeterministicInLibrary(Plain):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        out = HIDDEN["InLibrary"].apply(model(batch[0]))
        return cross_entropy(out, batch[1])


class Empty(Plain):
    num: ClassVar[dict[Split, int]] = {"train": 40, "validation": 0, "test": 24}


class Unpicklable(Plain):
    def dataset(self, split: Split) -> Any:
        rows = super().dataset(split)
        rows.change = lambda x: x
        return rows


class OneLeft(Plain):
    num: ClassVar[dict[Split, int]] = {"train": 41, "validation": 24, "test": 24}

    def model(self) -> nn.Module:
        return first(nn.BatchNorm1d(6))


class Unit(Plain):
    resampling_unit = "engine"


class Dying(Plain):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


class Slow(Plain):
    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        time.sleep(100)
        return super().score(model, batch)


# What looks suspicious and is not.


class Caches(Plain):
    """Keeps what it computed last, and tables; nothing depends on when they were made."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.last: dict[str, Tensor] = {}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.last["inputs"] = batch[0]
        return super().loss(model, batch)


class Remembers(Counter):
    def state_dict(self) -> dict[str, Any]:
        return {"num_calls": self.num_calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_calls = state["num_calls"]


class ActNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6))
        self.register_buffer("is_set", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.is_set:
            self.shift.data.copy_(-x.mean(0))
            self.is_set.fill_(True)  # type: ignore[operator]
        return x + self.shift


class SetsItself(Plain):
    def model(self) -> nn.Module:
        return first(ActNorm())


class DrawsGlobally(Plain):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * float(np.random.rand() + torch.rand(()))


# Exports.


class ZeroAtFirst(Plain):
    """Its outputs vary once it has trained."""

    def model(self) -> nn.Module:
        model = first(nn.Identity())
        nn.init.zeros_(model[1].weight)  # type: ignore[index]
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * 0.0


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.t = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.t.expand(x.shape[0], 1)


class ConstantOutput(Plain):
    def model(self) -> nn.Module:
        return Constant()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        out, temperature = model(batch[0])
        return cross_entropy(out / temperature, batch[1])

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": cross_entropy(model(batch[0])[0], batch[1], reduction="none")}


class Orthogonal(Plain):
    def model(self) -> nn.Module:
        return first(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)))


class Ragged(Plain):
    def dataset(self, split: Split) -> Any:
        return RaggedRows(self.num[split])

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 6), Mean(), nn.Linear(6, 2))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class RaggedRows:
    def __init__(self, num: int) -> None:
        self._num = num

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> Any:
        return torch.full((1 + index // 8,), index % 9), index % 2

    def collate(self, items: list[Any]) -> Any:
        points = nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
        return points, torch.tensor([y for _, y in items])


# Optimizers of one's own.


class Counting(torch.optim.SGD):
    """Every hundredth step is another one."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.num_steps += 1
        return super().step(closure) if self.num_steps % 100 else None


class CountingOptimizer(Plain):
    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"Counting": Counting(model.parameters(), lr=0.1)}

    def training_step(self, model: nn.Module, step: Any) -> Tensor:
        [(batch, _)] = step.microbatches
        loss = self.loss(model, batch)
        step.backward(loss)
        step.update("Counting")
        return loss


class LeavesOut(Plain):
    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        return [{"name": "weights", "params": weights}]


class Twice(Plain):
    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"name": "all", "params": [*model.parameters()]},
            {"name": "first", "params": [next(model.parameters())]},
        ]


# Epochs.


class Epochs(TensorDataset):
    """Told each epoch; which samples it gives depends on it alone."""

    def set_epoch(self, epoch: int) -> None:
        self.draws = np.random.default_rng(epoch)
        self.first = int(self.draws.integers(100))

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__((index + self.first) % len(self))


class ToldEpochs(Plain):
    kind: ClassVar[type[Epochs]] = Epochs
    defaults: ClassVar[dict[str, Any]] = {**Plain.defaults, "train": {"num_epochs": 3}}

    def dataset(self, split: Split) -> Any:
        data = super().dataset(split)
        return self.kind(*data.tensors) if split == "train" else data


class Adding(Epochs):
    first = 0

    def set_epoch(self, epoch: int) -> None:
        self.first += epoch


class AddsEpochs(ToldEpochs):
    kind = Adding


class Growing(Epochs):
    first, num = 0, 40

    def set_epoch(self, epoch: int) -> None:
        self.num = 40 - 8 * epoch

    def __len__(self) -> int:
        return self.num


class GrowsByEpoch(ToldEpochs):
    kind = Growing


class Sorted(TensorDataset):
    def order(self, epoch: int) -> Any:
        return range(8 * (epoch + 1))


class OwnOrder(ToldEpochs):
    kind = Sorted  # type: ignore[assignment]


class OutsideOrder(ToldEpochs):
    class kind(TensorDataset):  # type: ignore[assignment]
        def order(self, epoch: int) -> Any:
            return [3, 40] if epoch else [3]


class ToldPlace(Plain):
    def loss(self, model: nn.Module, batch: Batch, at: Any) -> Tensor:
        return super().loss(model, batch) * (1 + at.step + at.seed)


class Images(Plain):
    """Images alone."""

    def dataset(self, split: Split) -> Any:
        return [row[0] for row in super().dataset(split)]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.score(model, batch)["loss"].mean()

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": (model(batch) - batch).square().mean(1)}


class Keyed(Plain):
    """Items are dicts; which of their entries are inputs nobody says."""

    def dataset(self, split: Split) -> Any:
        return [{"input": row[0], "label": row[1]} for row in super().dataset(split)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, (batch["input"], batch["label"]))

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return super().score(model, (batch["input"], batch["label"]))


class KeyedAndNamed(Keyed):
    input_names = ("input",)


class RaggedAndDeclared(Ragged):
    dynamic_dimensions: ClassVar[dict[str, dict[int, str]]] = {"input": {1: "length"}}


class OneDictNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.layer(torch.cat((inputs["left"], inputs["right"]), 1))  # type: ignore[no-any-return]


class OneDict(Plain):
    """A model that takes all of its inputs in one dict."""

    def dataset(self, split: Split) -> Any:
        data = super().dataset(split)
        return [({"left": x[:2], "right": x[2:]}, y) for x, y in data]

    def model(self) -> nn.Module:
        return OneDictNet()


class NamedNet(OneDictNet):
    def forward(self, right: Tensor, left: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward({"left": left, "right": right})


class NamedInputs(OneDict):
    """Batches are dicts, whose inputs a model takes by keyword."""

    input_names = ("left", "right")

    def dataset(self, split: Split) -> Any:
        return [{**x, "label": y} for x, y in super().dataset(split)]

    def model(self) -> nn.Module:
        return NamedNet()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.score(model, batch)["loss"].mean()

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        logits = model(left=batch["left"], right=batch["right"])
        return {"loss": cross_entropy(logits, batch["label"], reduction="none")}
