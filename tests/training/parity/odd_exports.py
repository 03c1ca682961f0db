"""Small experiments whose models, inputs or outputs are of a kind that exports once refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from holdfast.training.experiment.protocol import Context, Records

NUM = 40


class Rows(Dataset[Any]):
    """Items of any kind, made by a function of the index."""

    def __init__(self, experiment: Base, split: str) -> None:
        number = ["train", "validation", "test"].index(split)
        self.experiment = experiment
        self.values = torch.randn(NUM, 6, generator=torch.Generator().manual_seed(number))

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Any:
        values = self.values[index]
        return self.experiment.inputs(values), int(values[0] > 0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 2)

    def logits(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x.to(self.first.weight.dtype))))

    def forward(self, x: Tensor) -> Any:
        return self.logits(x)


class Base:
    """Two classes of six numbers."""

    net: type[nn.Module] = Net

    def __init__(self, context: Context) -> None:
        pass

    def inputs(self, values: Tensor) -> Any:
        return values

    def dataset(self, split: str) -> Any:
        return Rows(self, split)

    def model(self) -> nn.Module:
        return self.net()

    def answer(self, model: nn.Module, inputs: Any) -> Tensor:
        return model(inputs)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.score(model, batch)["loss"].mean()

    def score(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        logits = self.answer(model, batch[0])
        return {"loss": cross_entropy(logits, batch[1], reduction="none")}

    def metrics(self, records: Records) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


class OneDict(Base):
    """A model that takes a dict."""

    class net(Net):
        def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
            return self.logits(torch.cat((inputs["left"], inputs["right"]), 1))

    def inputs(self, values: Tensor) -> Any:
        return {"right": values[3:], "left": values[:3]}


class Keywords(OneDict):
    """A model that takes arguments by name, and returns a dict with attributes."""

    class net(Net):
        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return Named(logits=self.logits(torch.cat((left, right), 1)), total=left.sum(1))

    def answer(self, model: nn.Module, inputs: Any) -> Tensor:
        return model(**inputs).logits


class Named(dict[str, Tensor]):
    """As libraries of transformers have it."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Answer(NamedTuple):
    logits: Tensor
    scale: Tensor


class Fields(Base):
    """Returns a named tuple, one of whose fields is the same for all samples."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Answer:
            return Answer(self.logits(x), self.scale.expand(x.shape[0], 1))

    def answer(self, model: nn.Module, inputs: Any) -> Tensor:
        found = model(inputs)
        return found.logits / found.scale


class Anchors(Base):
    """Returns anchors beside its logits, which no weight changes."""

    class net(Net):
        anchors: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("anchors", torch.arange(4.0))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.logits(x), self.anchors.expand(x.shape[0], 4)

    def answer(self, model: nn.Module, inputs: Any) -> Tensor:
        return model(inputs)[0]


class Bytes(Base):
    """Pixels as cameras give them."""

    dtype = torch.uint8

    def inputs(self, values: Tensor) -> Any:
        return (values * 40 + 120).clamp(0, 255).to(self.dtype)

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.logits(x.float() / 255 - 0.5)


class Shorts(Bytes):
    """16-bit numbers."""

    dtype = torch.int16


class SignedBytes(Bytes):
    """8-bit numbers, of which some are negative."""

    dtype = torch.int8

    def inputs(self, values: Tensor) -> Any:
        return (values * 40).clamp(-128, 127).to(self.dtype)


class Flags(Base):
    """Returns bytes beside its logits."""

    class net(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.logits(x), (x[:, :1] > 0).to(torch.uint8)

    def answer(self, model: nn.Module, inputs: Any) -> Tensor:
        return model(inputs)[0]


class Bfloat16(Base):
    """Weights, inputs and records in bfloat16."""

    def model(self) -> nn.Module:
        return super().model().bfloat16()

    def inputs(self, values: Tensor) -> Any:
        return values.bfloat16()


class Ragged(Base):
    """Samples of several lengths, padded to the longest of their batch."""

    def dataset(self, split: str) -> Any:
        return RaggedRows(self, split)

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.logits(x.sum(1, keepdim=True).expand(-1, 6))


class RaggedRows(Rows):
    def collate(self, items: list[Any]) -> Any:
        longest = max(2 + int(values[0].abs() * 2) for values, _ in items)
        inputs = torch.stack([values[:longest] for values, _ in items])
        return inputs, torch.tensor([target for _, target in items])


class TensorMetrics(Base):
    """Metrics as NumPy's numbers and tensors, which nobody has turned into floats."""

    def metrics(self, records: Records) -> dict[str, Any]:
        return {"loss": records["loss"].mean(), "worst": torch.tensor(records["loss"].max())}


class WithoutOnnx(Base):
    """Uses an operator that ONNX lacks."""

    def model(self) -> nn.Module:
        model = super().model()
        nn.utils.parametrizations.orthogonal(model.second)  # type: ignore[arg-type]
        return model
