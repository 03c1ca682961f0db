"""A step in the hands of an experiment: gradients, names, losses that are none, frozen layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer, SparseAdam

from holdfast import ConfigError, ExperimentError, Step
from holdfast.training.averages.ema import MovingAverages
from holdfast.training.configuration.schema import (
    EmaConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
    WarmupConfig,
)
from holdfast.training.data.loader import Microbatch
from holdfast.training.errors import NonFiniteLossError
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.train_step import TrainStep
from holdfast.training.optimizers.building import build_optimizers
from holdfast.training.optimizers.schedule import Schedule

CPU = torch.device("cpu")


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.last = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.first(x))
        return output


class Acting:
    """Does in a step what it is given."""

    names: ClassVar[tuple[str, ...]] = ("first", "last")

    def __init__(self, act: Callable[[Any, Step], Any]) -> None:
        self._act = act

    def training_step(self, model: Chain, step: Step) -> Any:
        return self._act(model, step)


class TwoOptimizers(Acting):
    kind: type[Any] = SGD

    def optimizers(self, model: Chain) -> Mapping[str, Optimizer]:
        return {name: self.kind(getattr(model, name).parameters(), lr=0.1) for name in self.names}


class Closures(TwoOptimizers):
    kind = LBFGS


def trained(
    experiment: Any,
    num_steps: int = 1,
    num_microbatches: int = 1,
    build: type[nn.Module] = Chain,
    **train: Any,
) -> tuple[TrainState, TrainStep]:
    torch.manual_seed(0)
    model = build()
    sgd = OptimizerConfig(name="SGD", args={"lr": 0.1})
    configured = OptimizerConfig() if hasattr(experiment, "optimizers") else sgd
    optimizers = build_optimizers(experiment, configured, model)
    state = TrainState(
        model=model,
        optimizers=optimizers,
        schedule=Schedule(optimizers, SchedulerConfig(), WarmupConfig(), 4, experiment),
        averages=MovingAverages(model, EmaConfig(decays=())),
        gradient_scaler=torch.amp.GradScaler("cpu", enabled=False),
        loss_sum=torch.zeros((), dtype=torch.float64),
        experiment=experiment,
    )
    step = TrainStep(experiment, TrainConfig(**train), state, CPU, seed=3)
    for number in range(num_steps):
        draws = torch.Generator().manual_seed(number)
        step(
            [
                Microbatch(
                    0, number, i, num_microbatches, 2 + i, 5, torch.randn(2 + i, 2, generator=draws)
                )
                for i in range(num_microbatches)
            ]
        )
    return state, step


def loss_of(model: Chain, step: Step) -> Tensor:
    return sum(  # type: ignore[return-value]
        weight * model(batch).square().mean() for batch, weight in step.microbatches
    )


def test_a_loss_for_one_optimizer_leaves_the_gradients_of_the_others_alone() -> None:
    found = []

    def act(model: Chain, step: Step) -> Tensor:
        loss = loss_of(model, step)
        step.backward(loss, "last")
        found.append(model.first.weight.grad)
        before = model.first.weight.clone()
        step.update("last")
        found.append(model.last.weight.grad)
        assert torch.equal(model.first.weight, before)
        step.backward(loss_of(model, step))
        assert model.last.weight.grad is not None
        step.update("first")
        found.append(model.first.weight.grad)
        assert model.last.weight.grad is not None  # the next step begins without it
        return loss

    trained(TwoOptimizers(act), 2)
    assert found == [None] * 6


def test_losses_may_have_a_forward_pass_in_common() -> None:
    def act(model: Chain, step: Step) -> Tensor:
        loss = loss_of(model, step)
        step.backward(loss, "first", retain_graph=True)
        step.backward(2 * loss, "last")
        first, last = model.first.weight.grad, model.last.weight.grad
        [of_first] = torch.autograd.grad(loss_of(model, step), model.first.weight)
        [of_last] = torch.autograd.grad(loss_of(model, step), model.last.weight)
        assert first is not None
        assert last is not None
        assert torch.equal(first, of_first)
        assert torch.equal(last, 2 * of_last)
        step.update("first")
        step.update("last")
        return loss

    trained(TwoOptimizers(act))


def test_the_step_knows_its_place_and_its_weights() -> None:
    places = []

    def act(model: Chain, step: Step) -> Tensor:
        assert [weight for _, weight in step.microbatches] == [2 / 5, 3 / 5]
        places.append((step.epoch, step.step, step.seed))
        loss = loss_of(model, step)
        step.backward(loss)
        step.update()
        return loss.detach()

    state, step = trained(Acting(act), 2, 2)
    assert [place[:2] for place in places] == [(0, 0), (0, 1)]
    assert len({seed for _, _, seed in places}) == 2
    again = list(places)
    places.clear()
    trained(Acting(act), 2, 2)
    assert places == again
    assert state.counters.step == 2
    assert state.loss_sum > step.last_loss > 0


def test_the_loss_that_is_told_does_not_change_when_its_tensor_does() -> None:
    kept = torch.zeros(())

    def act(model: Chain, step: Step) -> Tensor:
        loss = loss_of(model, step)
        step.backward(loss)
        step.update()
        return kept.copy_(loss.detach())

    _, step = trained(Acting(act))
    told = step.last_loss.item()
    kept.fill_(7)
    assert step.last_loss.item() == told != 7


def test_gradients_are_clipped_at_each_update_and_in_each_closure() -> None:
    norms = []

    def act(model: Chain, step: Step) -> Tensor:
        def closure() -> Tensor:
            loss = 1e3 * loss_of(model, step)
            step.backward(loss)
            return loss

        for name in ("first", "last"):
            for group in [*getattr(model, name).parameters()]:
                group.register_hook(lambda gradient: norms.append(gradient.norm().item()))
            step.update(name, closure)
        return loss_of(model, step)

    state, _ = trained(TwoOptimizers(act), clip_norm=0.01)
    assert max(norms) > 1
    torch.manual_seed(0)
    before = Chain()
    for one, two in zip(before.parameters(), state.model.parameters(), strict=True):
        assert 0 < (one - two).norm() <= 0.1 * 0.01 * 1.001


def test_a_closure_is_called_as_often_as_the_optimizer_asks() -> None:
    losses: list[float] = []

    def act(model: Chain, step: Step) -> Tensor:
        def closure() -> Tensor:
            loss = loss_of(model, step)
            step.backward(loss)
            losses.append(loss.item())
            return loss

        step.update("first", closure)
        return torch.as_tensor(step.update("last", closure))

    _, step = trained(Closures(act))
    assert len(losses) > 10
    assert losses[-1] < losses[0]
    assert step.last_loss.item() in losses


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda _, s: s.update("frist"), "no optimizer 'frist' to update; did you mean 'first'"),
        (lambda _, s: s.update(), r"update\(\) must name one of several optimizers: first, last"),
        (
            lambda m, s: s.backward(m(s.microbatches[0].batch)),
            r"takes a scalar tensor, a loss; found \[2, 1\]",
        ),
        (lambda _, s: s.backward(1.0), "takes a scalar tensor, a loss; found float"),
        (lambda *_: None, r"TwoOptimizers\.training_step must return a scalar tensor, .* NoneType"),
        (lambda *_: torch.zeros(2), r"training_step must return a scalar .* \[2\]"),
    ],
)
def test_what_is_no_step_is_refused(act: Any, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        trained(TwoOptimizers(act))


def test_the_configured_optimizer_has_no_name() -> None:
    with pytest.raises(ExperimentError, match=r"no optimizer 'adam' .* configured one has no name"):
        trained(Acting(lambda _, step: step.update("adam")))


def test_a_loss_that_is_not_finite_changes_nothing_more() -> None:
    seen = {}

    def act(model: Chain, step: Step) -> Tensor:
        loss = loss_of(model, step)
        seen["before"] = model.first.weight.clone()
        seen["model"] = model
        step.backward(loss * float("nan"))
        step.update()
        return loss

    with pytest.raises(NonFiniteLossError, match="the loss of step 1"):
        trained(Acting(act))
    assert torch.equal(seen["before"], seen["model"].first.weight)
    with pytest.raises(NonFiniteLossError):
        trained(Acting(lambda *_: torch.tensor(float("inf"))))


def test_a_closure_cannot_be_scaled() -> None:
    def act(model: Chain, step: Step) -> Tensor:
        step.update("first", lambda: loss_of(model, step))
        return loss_of(model, step)

    experiment = TwoOptimizers(act)
    torch.manual_seed(0)
    state, step = trained(TwoOptimizers(lambda m, s: loss_of(m, s).detach()))
    state.gradient_scaler = torch.amp.GradScaler("cpu", enabled=True)
    step._training_step = experiment.training_step
    with pytest.raises(ConfigError, match="'fp16' scales the loss, and an update with a closure"):
        step([Microbatch(0, 1, 0, 1, 2, 2, torch.ones(2, 2))])


def test_scaled_losses_give_the_same_weights() -> None:
    def act(model: Chain, step: Step) -> Tensor:
        for name in ("first", "last", "first"):
            loss = loss_of(model, step)
            step.backward(loss, name)
            step.update(name)
        step.backward(loss_of(model, step))
        step.update("last")
        step.update("first")
        return loss

    def weights(is_scaled: bool) -> dict[str, Tensor]:
        state, step = trained(TwoOptimizers(act), 0, clip_norm=1.0)
        state.gradient_scaler = torch.amp.GradScaler(
            "cpu", 2.0**8, growth_interval=1, enabled=is_scaled
        )
        for number in range(3):
            step(
                [
                    Microbatch(
                        0,
                        number,
                        0,
                        1,
                        3,
                        3,
                        torch.randn(3, 2, generator=torch.Generator().manual_seed(number)),
                    )
                ]
            )
        assert not is_scaled or state.gradient_scaler.get_scale() == 2.0 ** (8 + 3 * 4)
        return state.model.state_dict()

    plain = weights(False)
    for name, tensor in weights(True).items():
        assert torch.allclose(tensor, plain[name], rtol=1e-5), name


class Thawing(TwoOptimizers):
    names = ("last",)


def test_a_layer_that_is_unfrozen_must_have_its_optimizer() -> None:
    def act(model: Chain, step: Step) -> Tensor:
        if step.step == 1:
            model.first.requires_grad_(True)
        loss = loss_of(model, step)
        step.backward(loss)
        step.update("last")
        return loss

    class Froze(Thawing):
        def optimizers(self, model: Chain) -> Mapping[str, Optimizer]:
            model.first.requires_grad_(False)
            return super().optimizers(model)

    with pytest.raises(
        ExperimentError, match=r"first\.weight was frozen .* in step 2, and belongs"
    ):
        trained(Froze(act), 2)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(4, 2, sparse=True)
        self.last = nn.Linear(2, 1)


class SparseWords(Acting):
    def optimizers(self, model: Any) -> Mapping[str, Optimizer]:
        return {
            "sparse": SparseAdam(model.first.parameters()),
            "dense": SGD(model.last.parameters(), lr=0.1),
        }


def test_sparse_gradients_have_their_optimizer() -> None:
    def act(model: Words, step: Step) -> Tensor:
        loss = model.last(model.first(torch.tensor([1, 3]))).square().mean()
        step.backward(loss)
        assert model.first.weight.grad is not None
        assert model.first.weight.grad.is_sparse
        step.update("sparse")
        step.update("dense")
        return loss

    state, _ = trained(SparseWords(act), 2, build=Words)
    tensors, _ = state.capture()
    assert tensors["optimizer"]["sparse/first.weight/exp_avg"].shape == (4, 2)
    with pytest.raises(
        ConfigError, match=r"does not know sparse gradients.* first\.weight is spar"
    ):
        trained(SparseWords(act), clip_norm=1.0, build=Words)
