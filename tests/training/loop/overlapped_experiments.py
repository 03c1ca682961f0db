"""Small experiments whose weights, buffers and averages change at all the places that they may."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim import LBFGS, SGD, AdamW

from holdfast.training.experiment.protocol import Step
from tests.training.loop.odd_experiments import Plain


class Normed(Plain):
    """Batch norm and dropout: buffers and generators change in the forward pass."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)
        )


class Scaling(Normed):
    """Brings its first weights to a norm of one in each forward pass, as EDM2 does."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            model[0].weight.copy_(normalize(model[0].weight))  # type: ignore[index, arg-type]
        return super().loss(model, batch)


class ScalingOnce(Normed):
    """Does so at one call, long after the first."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        if self.num_calls == 7:
            model[0].weight.data.mul_(0.5)  # type: ignore[index, operator, union-attr]
        return loss


class Closing(Normed):
    """An optimizer that asks for the loss again and again, and keeps a history in lists."""

    defaults: ClassVar[dict[str, Any]] = {**Plain.defaults, "optimizer": {}}

    def optimizers(self, model: nn.Module) -> dict[str, Any]:
        return {"all": LBFGS(model.parameters(), lr=0.1, max_iter=3)}

    def training_step(self, model: nn.Module, step: Step) -> Tensor:
        (one,) = step.microbatches

        def closure() -> Tensor:
            loss = self.loss(model, one.batch)
            step.backward(loss)
            return loss

        return step.update("all", closure).detach()  # type: ignore[no-any-return]


class Resting(Normed):
    """Two optimizers, and every second step has no update."""

    defaults: ClassVar[dict[str, Any]] = {**Plain.defaults, "optimizer": {}}

    def optimizers(self, model: nn.Module) -> dict[str, Any]:
        first, *_, last = model
        return {
            "first": AdamW([*first.parameters(), *model[1].parameters()], lr=0.1),  # type: ignore[index]
            "last": SGD(last.parameters(), lr=0.1, momentum=0.9),
        }

    def training_step(self, model: nn.Module, step: Step) -> Tensor:
        (one,) = step.microbatches
        loss = self.loss(model, one.batch)
        if step.step % 2 == 0:
            step.backward(loss)
            step.update("first")
            step.update("last")
        return loss


class Clipping(Resting):
    """Begins by clipping weights past torch's count of changes."""

    def training_step(self, model: nn.Module, step: Step) -> Tensor:
        model[4].weight.data.mul_(0.9)  # type: ignore[index, operator, union-attr]
        return super().training_step(model, step)
