"""Callbacks of trainers, which may keep state of their own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.training.errors import InputError, kind_of


def require_told_state(callback: object, model: nn.Module, methods: str) -> None:
    """Make sure that a callback which tells no state hides none that can be seen.

    Raises InputError where an attribute is, or a list or dict in one has, a tensor, an optimizer,
    or a module that is not the model's: what trains there would be lost by a resume.
    """
    known = {id(module) for module in model.modules()}
    known |= {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    held = [(name, each) for name, value in vars(callback).items() for each in _parts(value)]
    for name, value in held:
        if isinstance(value, (nn.Module, Tensor, Optimizer)) and id(value) not in known:
            raise InputError(
                f"the callback {type(callback).__name__} has {kind_of(value)} in .{name} "
                f"and tells no state, so that a resume would lose it: give it {methods}"
            )


def _parts(value: object) -> Iterable[object]:
    """What a container holds, as an average of weights that goes by their names; else itself."""
    if isinstance(value, dict):
        return [*value.values()]
    return value if type(value) in {list, tuple} else [value]  # type: ignore[return-value]
