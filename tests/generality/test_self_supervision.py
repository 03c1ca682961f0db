"""Networks that follow others by a moving average, after the step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from holdfast import Step
from tests.generality.harness import assert_exact
from tests.generality.points import OnPoints

pytestmark = pytest.mark.slow

MOMENTUM = 0.9


class Following(nn.Module):
    """A student, which is what is exported, and its frozen teacher."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.predictor = nn.Linear(4, 4)

    def forward(self, points: Tensor) -> Tensor:
        output: Tensor = self.student(points)
        return output

    @torch.no_grad()
    def follow(self) -> None:
        for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            own.lerp_(other, 1 - MOMENTUM)


class Byol(OnPoints):
    """The teacher of a step is made after it."""

    def model(self) -> nn.Module:
        return Following(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)))

    def training_step(self, model: Any, step: Step) -> Tensor:
        [((points, _), _)] = step.microbatches
        one, two = points + 0.1 * torch.randn_like(points), points + 0.1 * torch.randn_like(points)
        loss = -cosine_similarity(model.predictor(model.student(one)), model.teacher(two)).mean()
        step.backward(loss)
        step.update()
        model.follow()
        return loss

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        return {"loss": -cosine_similarity(model(batch[0]), model.teacher(batch[0]))}


class Moco(Byol):
    """A queue of earlier keys, in a buffer, and its place."""

    def model(self) -> nn.Module:
        model = super().model()
        model.predictor = nn.Identity()
        model.register_buffer("queue", normalize(torch.randn(64, 4), dim=1))
        model.register_buffer("place", torch.zeros((), dtype=torch.int64))
        return model

    def training_step(self, model: Any, step: Step) -> Tensor:
        [((points, _), _)] = step.microbatches
        model.follow()
        query = normalize(model.student(points + 0.1 * torch.randn_like(points)), dim=1)
        key = normalize(model.teacher(points + 0.1 * torch.randn_like(points)), dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ model.queue.T], 1) / 0.2
        loss = cross_entropy(logits, torch.zeros(len(points), dtype=torch.int64))
        step.backward(loss)
        step.update()
        where = (model.place + torch.arange(len(key))) % len(model.queue)
        model.queue[where] = key.detach()
        model.place.add_(len(key)).remainder_(len(model.queue))
        return loss


def test_a_teacher_that_is_made_after_the_step_is_exact(tmp_path: Path) -> None:
    run = assert_exact(f"{__file__}:Byol", tmp_path)
    weights = load_file(max(run.checkpoints.glob("step-*")) / "model.safetensors")
    assert not torch.equal(weights["teacher.0.weight"], weights["student.0.weight"])


def test_a_queue_and_an_encoder_with_momentum_are_exact(tmp_path: Path) -> None:
    assert_exact(f"{__file__}:Moco", tmp_path)
