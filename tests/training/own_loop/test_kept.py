"""What a script keeps comes back whole, in the objects that the script has names for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.training.checkpointing.json_state import decode, encode
from holdfast.training.own_loop.kept import Kept, WatchedUpdates


def restored(before: Kept, after: Kept) -> None:
    """Put into ``after`` what ``before`` has, by way of what a checkpoint's files hold."""
    tensors: dict[str, Any] = {}
    written = json.dumps(encode(before.state_dict(), "kept", tensors, keeps_order=True))
    after.load_state_dict(decode(json.loads(written), tensors))


def test_lists_and_dicts_of_values_stay_the_ones_that_the_script_has_names_for() -> None:
    before, after = Kept(), Kept()
    before.values |= {"history": [1.0, 2.0], "best": {"loss": 0.5, "epochs": [3]}, "step": 7}
    history = after.values["history"] = []
    best = after.values["best"] = {"loss": 9.0, "stale": True}
    restored(before, after)
    history.append(3.0)
    best["loss"] = 0.25
    assert after.values == {
        "history": [1.0, 2.0, 3.0],
        "best": {"loss": 0.25, "epochs": [3]},
        "step": 7,
    }


def test_a_value_that_begins_as_the_models_own_state_leaves_the_model_as_it_is() -> None:
    before, after = Kept(), Kept()
    before.values["best"] = {"weight": torch.ones(1, 2)}
    model = torch.nn.Linear(2, 1, bias=False)
    weight = model.weight.detach().clone()
    after.values["best"] = dict(model.state_dict())
    restored(before, after)
    assert torch.equal(model.weight, weight)
    assert torch.equal(after.values["best"]["weight"], torch.ones(1, 2))


def test_a_random_state_of_numpys_goes_on_where_it_stood() -> None:
    before, after = Kept(), Kept()
    draws, resumed = np.random.RandomState(1), np.random.RandomState(2)
    draws.randn()  # the second one of a pair is waiting
    before.add("draws", draws)
    after.add("draws", resumed)
    restored(before, after)
    assert draws.randn(3).tolist() == resumed.randn(3).tolist()


class Nested(torch.optim.SGD):
    """Moves by an optimizer within it, as SAM does."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(list(parameters), lr=0.1)
        self.inner = torch.optim.Adam(self.param_groups[0]["params"])

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.inner.step()


class Wrapper:
    """Keeps an optimizer's state with its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])


class Slotted:
    """Has no attributes beside its own."""

    __slots__ = ("count",)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def forgotten(kept: Kept, model: nn.Module) -> Callable[[], torch.optim.Optimizer]:
    kept.add("optimizer", adam(model))
    other = adam(nn.Linear(2, 2))
    return lambda: other


def all_kept(kept: Kept, model: nn.Module) -> Callable[[], torch.optim.Optimizer]:
    kept.add("optimizer", optimizer := adam(model))
    return lambda: optimizer


def made_anew(kept: Kept, model: nn.Module) -> Callable[[], torch.optim.Optimizer]:
    kept.add("optimizer", adam(model))
    return lambda: adam(nn.Linear(2, 2))


def nested(kept: Kept, model: nn.Module) -> Callable[[], torch.optim.Optimizer]:
    kept.add("optimizer", optimizer := Nested(model.parameters()))
    return lambda: optimizer


def wrapped(kept: Kept, model: nn.Module) -> Callable[[], torch.optim.Optimizer]:
    wrapper = Wrapper(adam(model))
    kept.add("optimizer", wrapper)
    return lambda: wrapper.optimizer


def slotted(kept: Kept, model: nn.Module) -> Callable[[], torch.optim.Optimizer]:
    kept.add("counter", Slotted())
    return forgotten(kept, model)


def without_state(kept: Kept, model: nn.Module) -> Callable[[], torch.optim.Optimizer]:
    kept.add("optimizer", adam(model))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    return lambda: other


@pytest.mark.parametrize(
    ("make", "num_told"),
    [
        (forgotten, 1),
        (slotted, 1),
        *((m, 0) for m in (all_kept, made_anew, nested, wrapped, without_state)),
    ],
)
def test_an_optimizer_that_is_not_kept_is_told_of_once_where_a_resume_loses_its_state(
    make: Callable[[Kept, nn.Module], Callable[[], torch.optim.Optimizer]],
    num_told: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept, model = Kept(), nn.Linear(2, 2)
    kept.add("model", model)
    moving = make(kept, model)
    updates = WatchedUpdates(kept)
    for step in range(4):
        updates.begin_step(step)
        optimizer = moving()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    updates.end()
    told = [record.getMessage() for record in caplog.records]
    assert [text.partition(" that moves from step to step is not kept")[0] for text in told] == (
        ["an Adam"] * num_told
    )


def test_an_optimizer_within_a_kept_one_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    kept, model = Kept(), nn.Linear(2, 2)
    kept.add("model", model)
    moving = [nested(kept, model)(), adam(nn.Linear(2, 2))]
    updates = WatchedUpdates(kept)
    for step in range(4):
        updates.begin_step(step)
        for optimizer in moving:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    updates.end()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_scheduler_that_is_not_kept_is_told_of(
    is_kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    kept, model = Kept(), nn.Linear(2, 2)
    kept.add("model", model)
    kept.add("optimizer", optimizer := adam(model))
    kept.add("draws", torch.Generator())
    kept.tell_of_lost_schedule()
    assert not caplog.records
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    if is_kept:
        kept.add("scheduler", scheduler)
    kept.tell_of_lost_schedule()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (not is_kept)
    assert all(
        text.startswith("a learning rate scheduler of optimizer is not kept") for text in told
    )
