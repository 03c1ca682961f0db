"""A model's weights, put back as they were: with their own types, shapes and strides.

torch's own loader casts what it is given to the type of what is there. A buffer may have begun as
None, or with another shape or type, as observers of quantisation and lazily filled caches do; it
comes back as it was saved.

A file holds the numbers of a tensor in their logical order. Kernels may walk memory as it lies, and
then channels_last weights with momentum that came back contiguous give other numbers. So strides
are noted where they are not the usual ones, and put back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.errors import CheckpointMismatchError, kind_of

MAX_DIFFERENCES_SHOWN = 3
Slot = tuple[dict[str, Any], str]
Strides = Sequence[int] | None
"""Of a dense tensor; None where it is contiguous."""


def load_model(model: nn.Module, weights: Mapping[str, Any], absent: Collection[str] = ()) -> None:
    """Load a model's state dict. Raises CheckpointMismatchError where names or shapes differ.

    Parameters must have the model's own type. Buffers take the shape and type of what is loaded.
    Names in ``absent`` may be left out: those tensors stay as they are.
    """
    cast = [name for name, there, here in _parameters(model, weights) if there.dtype != here.dtype]
    if cast:
        raise _mismatch(model, list(_differences(weights, model.state_dict())))
    take_buffers(model, weights)
    try:
        keys = model.load_state_dict(dict(weights), strict=not absent)
    except RuntimeError as error:
        found = list(_differences(weights, _needed(model, weights, absent)))
        raise _mismatch(model, found or [" ".join(str(error).split())]) from error
    if set(keys.missing_keys) - set(absent) or keys.unexpected_keys:
        raise _mismatch(model, list(_differences(weights, _needed(model, weights, absent))))


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a module's state dict, and what else it holds (``get_extra_state``)."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return tensors, extra


def lay_out_model(model: nn.Module, strides: Mapping[str, Strides]) -> None:
    """Lay tensors of the model out anew; each stays the same object."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in strides:
            tensor.data = laid_out(tensor.data, strides[name])


def strides_of(tensor: Tensor) -> Strides:
    """The strides of a dense tensor whose dimensions lie in the order of this one's."""
    if tensor.is_contiguous():
        return None
    dense = torch.empty_like(tensor, device="meta")
    return None if dense.is_contiguous() else dense.stride()


def unusual_strides(
    tensors: Mapping[str, Tensor], usual: Mapping[str, Strides]
) -> dict[str, list[int] | None]:
    """The strides of those tensors that lie otherwise than ``usual`` says; its default is None."""
    found = {name: strides_of(tensor) for name, tensor in tensors.items()}
    return {
        name: None if strides is None else list(strides)
        for name, strides in found.items()
        if strides != usual.get(name)
    }


def laid_out(tensor: Tensor, strides: Strides) -> Tensor:
    """The same numbers with these strides; the tensor itself where it has them."""
    if strides_of(tensor) == (None if strides is None else tuple(strides)):
        return tensor
    if strides is None:
        return tensor.contiguous()
    placed = torch.empty_strided(
        tensor.shape, tuple(strides), dtype=tensor.dtype, device=tensor.device
    )
    return placed.copy_(tensor)


def all_laid_out(
    tensors: Mapping[str, Tensor], strides: Mapping[str, Strides]
) -> dict[str, Tensor]:
    """Tensors by name, those that have strides here laid out by them."""
    return {
        name: laid_out(tensor, strides[name]) if name in strides else tensor
        for name, tensor in tensors.items()
    }


def buffer_slots(model: nn.Module) -> dict[str, Slot]:
    """Where each persistent buffer is kept, by its name in the state dict."""
    return {
        f"{prefix}.{key}" if prefix else key: (module._buffers, key)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key in module._buffers
        if key not in module._non_persistent_buffers_set
    }


def take_buffers(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Give buffers that are of another kind than what is loaded a place of that kind."""
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    for name, (where, key) in buffer_slots(model).items():
        own, there = where[key], weights.get(name)
        if not isinstance(there, Tensor):
            continue
        if own is None or own.shape != there.shape or own.dtype != there.dtype:
            device = own.device if own is not None else next(iter(devices), there.device)
            where[key] = there.to(device, copy=True)


def _parameters(
    model: nn.Module, weights: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(there := weights.get(name), Tensor):
            yield name, there, parameter


def _needed(
    model: nn.Module, weights: Mapping[str, Any], absent: Collection[str]
) -> dict[str, Any]:
    """The model's state dict, without what may be absent and is."""
    state = model.state_dict()
    return {name: state[name] for name in state if name in weights or name not in absent}


def _mismatch(model: nn.Module, found: list[str]) -> CheckpointMismatchError:
    shown = found[:MAX_DIFFERENCES_SHOWN]
    if len(found) > MAX_DIFFERENCES_SHOWN:
        shown.append(f"and {len(found) - MAX_DIFFERENCES_SHOWN} more")
    return CheckpointMismatchError(
        f"these weights are not of {kind_of(model)} as it is configured: "
        f"{'; '.join(shown)}: use the settings and the code that made them, or another run id"
    )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Each name whose shapes differ, or else whose types do, in words."""
    for name in dict.fromkeys([*here, *there]):
        found = [part.get(name) for part in (there, here)]
        kinds = [str(list(e.shape)) if isinstance(e, Tensor) else "absent" for e in found]
        if kinds[0] == kinds[1] != "absent":
            kinds = [str(e.dtype) for e in found if isinstance(e, Tensor)]
        if kinds[0] != kinds[1]:
            yield f"{name} is {kinds[0]} there, {kinds[1]} here"
