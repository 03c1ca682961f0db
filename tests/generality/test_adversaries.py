"""Two networks against each other: several optimizers in turn, and a penalty on gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Adam, RMSprop

from holdfast import Step
from tests.faults.campaign import Training
from tests.generality.harness import QUICK_EXPORT, assert_exact, assert_published
from tests.generality.points import OnPoints

pytestmark = pytest.mark.slow


class Pair(nn.Module):
    """A generator, which is what is exported, and its critic."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6)
        )
        self.critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, noise: Tensor) -> Tensor:
        output: Tensor = self.generator(noise)
        return output


class Gan(OnPoints):
    """Three steps of the critic, each with a microbatch of its own, then one of the generator."""

    defaults: ClassVar[dict[str, Any]] = {
        **OnPoints.defaults,
        "train": {"num_epochs": 12, "num_microbatches": 3, "clip_norm": 1.0},
        "data": {"batch_size": 24},
        "scheduler": {"name": "StepLR", "args": {"step_size": 5}, "optimizers": ["critic"]},
    }

    def model(self) -> nn.Module:
        return Pair()

    def optimizers(self, model: Any) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": RMSprop(model.critic.parameters(), lr=1e-3),
            "generator": Adam(model.generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        }

    def training_step(self, model: Any, step: Step) -> Tensor:
        for (points, _), _ in step.microbatches:
            with step.autocast():
                made = model(torch.randn_like(points)).detach()
                loss = self.critic_loss(model.critic, points, made)
            step.backward(loss, "critic")
            step.update("critic")
        loss = softplus(-model.critic(model(torch.randn_like(points)))).mean()
        step.backward(loss, "generator")
        step.update("generator")
        return loss

    def critic_loss(self, critic: nn.Module, points: Tensor, made: Tensor) -> Tensor:
        return softplus(-critic(points)).mean() + softplus(critic(made)).mean()

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        made = model(batch[0])
        return {"loss": (made.mean(1) - batch[0].mean(1)).square(), "made": made}


class Wasserstein(Gan):
    """The critic's slope between real and made points is held to one (Gulrajani et al. 2017)."""

    def critic_loss(self, critic: nn.Module, points: Tensor, made: Tensor) -> Tensor:
        share = torch.rand(len(points), 1)
        between = (share * points + (1 - share) * made).requires_grad_()
        [slope] = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return critic(made).mean() - critic(points).mean() + 10 * penalty


def test_a_gan_with_three_critic_steps_is_exact_to_its_bundle(tmp_path: Path) -> None:
    experiment = f"{__file__}:Gan"
    run = assert_exact(experiment, tmp_path)
    last = max(run.checkpoints.glob("step-*"))
    with safe_open(last / "optimizer.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "critic/critic.0.weight/square_avg" in names
    assert "generator/generator.0.weight/exp_avg" in names
    assert {name.partition("/")[0] for name in names} == {"critic", "generator"}
    calm = Training(tmp_path / "calm", "one", experiment, QUICK_EXPORT)
    assert (assert_published(calm).bundle / "manifest.json").is_file()


def test_a_gan_with_a_penalty_on_gradients_is_exact(tmp_path: Path) -> None:
    assert_exact(f"{__file__}:Wasserstein", tmp_path)
