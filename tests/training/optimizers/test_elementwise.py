"""Optimizers whose bits do not depend on how weights are cut, and those that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.training.errors import ExperimentError
from holdfast.training.optimizers.elementwise import require_elementwise


class ByNorm(torch.optim.SGD):
    """As LARS and LAMB do: the rate depends on the whole tensor."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(parameter.detach().norm())
        return super().step(closure)


class Raises(torch.optim.SGD):
    """Something of its own that a copy lacks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mine = 1

    def step(self, closure: Any = None) -> Any:
        self.mine += 1
        return super().step(closure)


def built(kind: type[Optimizer], dtype: torch.dtype = torch.float32, **options: Any) -> Optimizer:
    return kind([nn.Parameter(torch.ones(3, 2, dtype=dtype))], lr=0.0, **options)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "optimizer",
    [
        built(torch.optim.AdamW),
        built(torch.optim.AdamW, torch.float64, amsgrad=True, foreach=True),
        built(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
        built(torch.optim.RMSprop, momentum=0.9, centered=True),
        built(torch.optim.Adagrad),
    ],
)
def test_what_takes_each_element_by_itself_is_taken_and_left_as_it_is(optimizer: Any) -> None:
    before, num_kept = torch.get_rng_state(), len(optimizer.state)
    require_elementwise([optimizer])
    assert torch.equal(torch.get_rng_state(), before)
    assert len(optimizer.state) == num_kept
    [group] = optimizer.param_groups
    assert group["lr"] == 0.0
    assert [parameter.tolist() for parameter in group["params"]] == [[[1.0, 1.0]] * 3]


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (built(torch.optim.AdamW, fused=True), "AdamW updates torch.float32 weights in slices"),
        (built(torch.optim.Muon), "Muon updates torch.float32 weights in slices otherwise"),
        (built(torch.optim.Adafactor), "Adafactor updates torch.float32 weights in slices"),
        (built(ByNorm), "ByNorm updates torch.float32 weights in slices otherwise than whole"),
        (built(torch.optim.AdamW, torch.bfloat16), "AdamW updates torch.bfloat16 weights, so"),
        (built(torch.optim.LBFGS), "LBFGS cannot be tried on small tensors "),
        (built(Raises), "Raises cannot be tried on small tensors (AttributeError"),
    ],
)
def test_what_looks_at_more_than_an_element_is_refused_in_one_line(
    optimizer: Optimizer, told: str
) -> None:
    with pytest.raises(ExperimentError) as caught:
        require_elementwise([optimizer])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
