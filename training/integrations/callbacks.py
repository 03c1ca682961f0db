"""Callbacks of trainers, which may keep state of their own."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.errors import InputError


def require_told_state(callback: object, model: nn.Module, methods: str) -> None:
    """Make sure that a callback which tells no state hides none that can be seen.

    Raises InputError where an attribute is a tensor, an optimizer, or a module that is not the
    model's: what trains there would be lost by a resume.
    """
    known = {id(module) for module in model.modules()}
    known |= {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for name, value in vars(callback).items():
        if isinstance(value, (nn.Module, Tensor, Optimizer)) and id(value) not in known:
            raise InputError(
                f"the callback {type(callback).__name__} has a {type(value).__name__} in .{name} "
                f"and tells no state, so that a resume would lose it: give it {methods}"
            )
