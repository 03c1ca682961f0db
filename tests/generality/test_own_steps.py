"""Steps that are more than a backward and an update: closures, two updates, an ascent, a game."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, AdamW, Muon
from torch.utils.data import TensorDataset

from holdfast import Step
from tests.generality.harness import assert_exact
from tests.generality.points import OnPoints, classification_rows


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


class MuonBesideAdamW(OnPoints):
    """Muon for matrices, AdamW for the rest, after one backward."""

    defaults: ClassVar[dict[str, Any]] = {
        **OnPoints.defaults,
        "train": {"num_epochs": 12, "num_microbatches": 2},
        "warmup": {"num_steps": 10},
        "scheduler": {"name": "CosineAnnealingLR", "args": {"T_max": 60}, "interval": "step"},
    }

    def model(self) -> nn.Module:
        return classifier()

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
        return {"muon": Muon(matrices, lr=0.02), "adamw": AdamW(others, lr=0.01)}

    def training_step(self, model: nn.Module, step: Step) -> Tensor:
        total = torch.zeros(())
        for (points, classes), weight in step.microbatches:
            with step.autocast():
                loss = weight * cross_entropy(model(points), classes)
            step.backward(loss)
            total += loss.detach()
        step.update("muon")
        step.update("adamw")
        return total

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return classification_rows(model(batch[0]), batch[1])


class Sharp(MuonBesideAdamW):
    """SAM with the configured optimizer: up to where the loss is large nearby, its slope there."""

    defaults: ClassVar[dict[str, Any]] = {
        **OnPoints.defaults,
        "optimizer": {"name": "SGD", "args": {"lr": 0.05, "momentum": 0.9}},
        "scheduler": {"name": "ReduceLROnPlateau", "args": {"patience": 1}},
    }
    optimizers = None  # type: ignore[assignment]

    def training_step(self, model: nn.Module, step: Step) -> Tensor:
        [((points, classes), _)] = step.microbatches
        loss = cross_entropy(model(points), classes)
        step.backward(loss)
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        slopes = [parameter.grad for parameter in trained]
        norm = torch.stack([slope.norm() for slope in slopes if slope is not None]).norm()
        ascents = [0.05 * slope / (norm + 1e-12) for slope in slopes if slope is not None]
        with torch.no_grad():
            torch._foreach_add_(trained, ascents)
        model.zero_grad()
        step.backward(cross_entropy(model(points), classes))
        with torch.no_grad():
            torch._foreach_sub_(trained, ascents)
        step.update()
        return loss


class Oscillator(OnPoints):
    """u'' = -u with u(0) = 0 and u'(0) = 1, by LBFGS; its score is a derivative, too."""

    defaults: ClassVar[dict[str, Any]] = {**OnPoints.defaults, "data": {"batch_size": 96}}

    def dataset(self, split: str) -> TensorDataset:
        times = torch.linspace(0, 3, 48).reshape(-1, 1).repeat(2, 1)
        return TensorDataset(times, times.sin())

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        options: dict[str, Any] = {
            "max_iter": 4,
            "history_size": 5,
            "line_search_fn": "strong_wolfe",
        }
        return {"lbfgs": LBFGS(model.parameters(), lr=0.5, **options)}

    def training_step(self, model: nn.Module, step: Step) -> Tensor:
        [((times, _), _)] = step.microbatches

        def closure() -> Tensor:
            loss = self._residuals(model, times).square().mean()
            step.backward(loss)
            return loss

        found: Tensor = step.update("lbfgs", closure)
        return torch.as_tensor(found)

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        with torch.enable_grad():
            return {"loss": self._residuals(model, batch[0]).detach().square().mean(1)}

    def _residuals(self, model: nn.Module, times: Tensor) -> Tensor:
        times = times.clone().requires_grad_()
        u = times + times.square() * model(times)
        [first] = torch.autograd.grad(u.sum(), times, create_graph=True)
        [second] = torch.autograd.grad(first.sum(), times, create_graph=True)
        return second + u


class Actor(OnPoints):
    """Actor and critic on a walk; the data set only counts steps, the step plays."""

    defaults: ClassVar[dict[str, Any]] = {**OnPoints.defaults, "train": {"num_epochs": 8}}

    def model(self) -> nn.Module:
        layers = {"trunk": nn.Linear(6, 16), "actor": nn.Linear(16, 2), "critic": nn.Linear(16, 1)}
        model = nn.ModuleDict(layers)
        model.register_buffer("place", torch.zeros(6))
        return model

    def training_step(self, model: Any, step: Step) -> Tensor:
        draws = torch.Generator().manual_seed(step.seed)
        losses = []
        for _ in range(5):
            hidden = model.trunk(model.place.clone()).relu()
            choice = Categorical(logits=model.actor(hidden))
            action = choice.sample()
            with torch.no_grad():
                model.place += (2 * action - 1) * torch.rand(6, generator=draws) - 0.1 * model.place
            advantage = -model.place.norm() - model.critic(hidden).squeeze()
            losses.append(advantage.square() - choice.log_prob(action) * advantage.detach())
        loss = torch.stack(losses).mean()
        step.backward(loss)
        step.update()
        return loss

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        return classification_rows(model.actor(model.trunk(batch[0]).relu()), batch[1])


@pytest.mark.slow
def test_muon_beside_adamw_is_exact(tmp_path: Path) -> None:
    assert_exact(f"{__file__}:MuonBesideAdamW", tmp_path)


@pytest.mark.slow
def test_sharpness_aware_steps_are_exact(tmp_path: Path) -> None:
    assert_exact(f"{__file__}:Sharp", tmp_path)


@pytest.mark.slow
def test_steps_with_a_closure_are_exact(tmp_path: Path) -> None:
    overrides = ("train.num_epochs=30", "checkpoint.every_epochs=4")
    assert_exact(f"{__file__}:Oscillator", tmp_path, overrides)


@pytest.mark.slow
def test_an_actor_and_its_critic_are_exact(tmp_path: Path) -> None:
    assert_exact(f"{__file__}:Actor", tmp_path)
