"""Parameter groups, rates by functions of the step, and optimizers and schedulers by reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from holdfast.training.checkpointing.diff import compare
from tests.faults.campaign import Training
from tests.generality.harness import QUICK_EXPORT, assert_exact, assert_published
from tests.generality.points import OnPoints, classification_rows

pytestmark = pytest.mark.slow

NUM_TOKENS, LENGTH = 11, 8
SEQUENCE = (
    json.dumps(
        [
            {"name": "LinearLR", "args": {"start_factor": 0.25, "total_iters": 6}},
            {"name": "InverseSquareRoot", "args": {"timescale_steps": 6}},
            {"name": "MultiStepLR", "args": {"milestones": [4, 9], "gamma": 0.5}},
        ]
    )
    .replace(":", " =")
    .replace('"name"', "name")
)


class Block(nn.Module):
    """A decoder of one layer; embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(NUM_TOKENS, 16)
        self.places = nn.Embedding(LENGTH, 16)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(16, 48)
        self.head = nn.Linear(16, NUM_TOKENS, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        query, key, value = self.mix(self.norm(x)).chunk(3, dim=-1)
        scores = query @ key.transpose(1, 2) / 4
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        logits: Tensor = self.head(x + scores.masked_fill(mask, -1e9).softmax(-1) @ value)
        return logits


class NanoGpt(OnPoints):
    """No decay on biases and norms, and a cosine with its own warm-up and floor."""

    defaults: ClassVar[dict[str, Any]] = {
        **OnPoints.defaults,
        "train": {"num_epochs": 12, "num_microbatches": 2, "clip_norm": 1.0},
        "optimizer": {"name": "AdamW", "args": {"lr": 0.01, "betas": [0.9, 0.95]}},
    }

    def dataset(self, split: str) -> Any:
        draws = torch.Generator().manual_seed(len(split))
        starts = torch.randint(NUM_TOKENS, (96, 1), generator=draws)
        tokens = (starts + 3 * torch.arange(LENGTH + 1)) % NUM_TOKENS
        return torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:])

    def model(self) -> nn.Module:
        return Block()

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        return [
            {"name": "decay", "params": matrices, "weight_decay": 0.1},
            {"name": "no_decay", "params": others, "weight_decay": 0.0, "lr": 0.02},
        ]

    def rate_factor(self, step: int) -> float:
        if step < 6:
            return (step + 1) / 6
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - 6) / 60)))

    def weight_decay_factor(self, step: int) -> dict[str, float]:
        return {"decay": 1 + step / 72, "no_decay": 1.0}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        logits = model(batch[0])
        losses = cross_entropy(logits.transpose(1, 2), batch[1], reduction="none")
        return {"loss": losses.mean(1)}


class Classified(OnPoints):
    """What is configured is the point."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return classification_rows(model(batch[0]), batch[1])


def test_parameter_groups_with_rates_by_a_function_are_exact_to_the_bundle(tmp_path: Path) -> None:
    experiment = f"{__file__}:NanoGpt"
    run = assert_exact(experiment, tmp_path)
    state = json.loads((max(run.checkpoints.glob("step-*")) / "state.json").read_text())
    decay, no_decay = (group["options"] for group in state["optimizer"]["groups"])
    assert (decay["name"], no_decay["name"]) == ("decay", "no_decay")
    assert decay["weight_decay"] == 0.1 * (1 + 72 / 72)
    assert decay["lr"] == 0.01 * NanoGpt.rate_factor(NanoGpt(None), 72)
    assert no_decay["lr"] == 2 * decay["lr"]
    assert state["scheduler"]["traces"].keys() == {"decay", "no_decay"}
    earlier, last = sorted(run.checkpoints.glob("step-*"))[-2:]
    found = {difference.name for difference in compare(earlier, last).differences}
    assert "groups.decay.options.weight_decay" in found
    calm = Training(tmp_path / "calm", "one", experiment, QUICK_EXPORT)
    assert (assert_published(calm).bundle / "manifest.json").is_file()


def test_an_optimizer_and_a_scheduler_by_reference_are_exact(tmp_path: Path) -> None:
    overrides = (
        "optimizer.name=lookahead:Lookahead",
        "optimizer.args.lr=0.05",
        "optimizer.args.every=3",
        "scheduler.name=lookahead:Sawtooth",
        "scheduler.args.period=7",
        "scheduler.interval=step",
    )
    assert_exact(f"{__file__}:Classified", tmp_path, overrides)


def test_schedulers_one_after_the_other_are_exact(tmp_path: Path) -> None:
    overrides = (
        "scheduler.name=SequentialLR",
        f"scheduler.args.schedulers={SEQUENCE}",
        "scheduler.args.milestones=[8,30]",
        "scheduler.interval=step",
    )
    run = assert_exact(f"{__file__}:Classified", tmp_path, overrides)
    state = json.loads((max(run.checkpoints.glob("step-*")) / "state.json").read_text())
    assert state["optimizer"]["groups"][0]["options"]["lr"] == 1e-3 / 4
