"""State of callbacks that can be seen from outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.training.errors import InputError
from holdfast.training.integrations.callbacks import require_told_state


class Holding:
    """A callback that tells no state."""

    def __init__(self, held: object) -> None:
        self.held = held


@pytest.mark.parametrize(
    "held",
    [torch.ones(2), nn.Linear(1, 1), {"weight": torch.ones(2)}, [torch.ones(2)], (torch.ones(2),)],
)
def test_a_callback_that_holds_what_it_does_not_tell_is_refused(held: object) -> None:
    with pytest.raises(InputError, match=r"the callback Holding has a \w+ in \.held and tells no"):
        require_told_state(Holding(held), nn.Linear(2, 2), "state_dict")


def test_what_is_the_models_may_be_held() -> None:
    model = nn.Linear(2, 2)
    for held in (model, [*model.parameters()], dict(model.named_parameters()), {"a": 1}, "text"):
        require_told_state(Holding(held), model, "state_dict")
