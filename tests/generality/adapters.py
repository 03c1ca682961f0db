"""LoRA: small trained layers beside the frozen weights of a base that somebody else made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from holdfast import Context, Section

NUM_CLASSES = 3


class Adapted(nn.Module):
    """A linear layer that is frozen, and a product of two thin matrices that is trained."""

    def __init__(self, frozen: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = frozen.requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(rank, frozen.in_features))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.base(inputs) + inputs @ self.down.T @ self.up.T
        return outputs

    def folded(self) -> nn.Linear:
        """One layer with both."""
        with torch.no_grad():
            self.base.weight += self.up @ self.down
        return self.base


def network(width: int = 64) -> nn.Sequential:
    """What the base was trained as."""
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


class Lora:
    """Adapters on a base that is drawn from the run's seed."""

    defaults: Mapping[str, Any] = {
        "train": {"num_epochs": 12},
        "data": {"batch_size": 16},
        "optimizer": {"args": {"lr": 0.01}},
        "checkpoint": {"frozen": "left_out"},
        "selection": {"top_k": 3},
    }

    def __init__(self, context: Context) -> None:
        self.settings: Any = context.settings

    def dataset(self, split: str) -> list[tuple[Tensor, int]]:
        draws = torch.Generator().manual_seed(len(split))
        inputs = torch.randn(96, 6, generator=draws)
        targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
        return [(row, int(target)) for row, target in zip(inputs, targets, strict=True)]

    def model(self) -> nn.Module:
        model = self.network()
        for index in (0, 2):
            model[index] = Adapted(model[index])  # type: ignore[arg-type]
        return model

    def network(self) -> nn.Sequential:
        return network()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": cross_entropy(model(batch[0]), batch[1], reduction="none")}

    def metrics(self, records: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


class KeptLora(Lora):
    """The same, with the base in every checkpoint."""

    defaults: Mapping[str, Any] = {**Lora.defaults, "checkpoint": {}}


class MergedLora(Lora):
    """The same, exported as one network without adapters."""

    def merged(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        for index in (0, 2):
            adapted = model[index]
            assert isinstance(adapted, Adapted)
            model[index] = adapted.folded()
        return model


class WronglyMergedLora(Lora):
    """Forgets the adapters when it merges."""

    def merged(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        for index in (0, 2):
            adapted = model[index]
            assert isinstance(adapted, Adapted)
            model[index] = adapted.base
        return model


class FileLora(Lora):
    """Adapters on a base from a file."""

    class Settings(Section):
        """Where the base is."""

        base: Path

    def base_files(self) -> Sequence[Path]:
        return [self.settings.base]

    def network(self) -> nn.Sequential:
        base = network()
        base.load_state_dict(load_file(self.settings.base))
        return base


class SilentlyChanged(Lora):
    """Writes to a frozen weight past torch's counter, in the seventh step."""

    num_calls = 0

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.num_calls += 1
        if self.num_calls == 7:
            self.change(model)
        return super().loss(model, batch)

    def change(self, model: nn.Module) -> None:
        model.get_parameter("0.base.weight").data[0, 0] += 1.0


class OpenlyChanged(SilentlyChanged):
    """Writes to a frozen weight in the seventh step."""

    def change(self, model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("0.base.weight")[0, 0] += 1.0


class Unfreezing(SilentlyChanged):
    """Unfreezes a layer in the seventh step."""

    def change(self, model: nn.Module) -> None:
        model.get_parameter("2.base.weight").requires_grad_(True)


class KeptUnfreezing(KeptLora):
    """Unfreezes a layer after twenty steps, told by the model itself, and keeps all."""

    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        return model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        count = model.get_buffer("num_calls")
        count += 1
        if int(count) > 20:
            model.get_parameter("2.base.weight").requires_grad_(True)
        return super().loss(model, batch)


class NothingFrozen(Lora):
    """Asks for what there is not."""

    def model(self) -> nn.Module:
        return network()
