"""Weights, gradients, optimizer and averages in slices on the ranks: torch's ``fully_shard``.

A checkpoint is the one that a process alone would write: rank 0 is given whole tensors for it, one
after the other, and each rank takes its slices of what is restored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from holdfast.training.distributed.world import World
from holdfast.training.errors import ExperimentError, UnsupportedStateError

Tensors = Mapping[str, Mapping[str, Tensor]]


class Spread:
    """The slices of a model on the ranks of a training.

    Attributes:
        before_gathering: called before tensors are gathered; all ranks must gather then.
        first_digest: of the whole weights that this rank began with.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        parallelize: Callable[[nn.Module, DeviceMesh], object] | None = None,
    ) -> None:
        """Collective. Put each rank's slices in the place of the model's parameters.

        ``parallelize`` wraps parts of the model with the given mesh; without it, each element of a
        ModuleList is a part. What is in no part is one together.

        Raises ExperimentError for a parameter that cannot be cut.
        """
        _require_whole(model)
        names = model.named_parameters(remove_duplicate=False)
        first: dict[int, str] = {}
        self._first = {name: first.setdefault(id(p), name) for name, p in names}
        self.first_digest = _digest(model)
        self.before_gathering: Callable[[], None] = lambda: None
        mesh = init_device_mesh("cpu", (world.size,))
        if parallelize is None:
            for part in parts_of(model):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        else:
            parallelize(model, mesh)
        if not isinstance(model, FSDPModule):
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self._slices = {
            name: parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if isinstance(parameter, DTensor)
        }

    def begin_pass(self, *, is_last: bool) -> None:
        """Before each forward and backward pass of a step: gradients are summed in the last one."""
        for module in self._modules:
            module.set_requires_gradient_sync(is_last, recurse=False)

    @torch.no_grad()
    def gathered(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """Collective. The same tensors, by file stem and name, whole; tied ones are the same."""
        self.before_gathering()
        whole: dict[str, dict[str, Tensor]] = {}
        for stem, inner in tensors.items():
            known: dict[str, Tensor] = {}
            whole[stem] = {}
            for name, tensor in inner.items():
                self._require_shape(stem, name, tensor)
                first = self._first_name(stem, name)
                if isinstance(tensor, DTensor) and first not in known:
                    known[first] = tensor.full_tensor()
                whole[stem][name] = known.get(first, tensor)
        return whole

    def sliced(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """This rank's slices of whole tensors; what lies in no slices stays as it is."""
        return {
            stem: {name: self._slice(stem, name, tensor) for name, tensor in inner.items()}
            for stem, inner in tensors.items()
        }

    def _require_shape(self, stem: str, name: str, tensor: Tensor) -> None:
        own = self._slices.get(_parameter_of(stem, name))
        if isinstance(tensor, DTensor) and (own is None or own.shape != tensor.shape):
            raise UnsupportedStateError(
                f"{stem}.{name} lies in slices and has not the shape of a parameter, so a resume "
                f"could not put it back: with distributed.strategy=fsdp use an optimizer whose "
                f"state has its parameters' shapes, such as AdamW or SGD"
            )

    def _first_name(self, stem: str, name: str) -> str:
        if stem != "ema":
            return self._first.get(name, name)
        track, _, own = name.partition("/")
        return f"{track}/{self._first.get(own, own)}"

    def _slice(self, stem: str, name: str, tensor: Tensor) -> Tensor:
        own = self._slices.get(_parameter_of(stem, name))
        if own is None or own.shape != tensor.shape:
            return tensor
        mesh, placements = own.device_mesh, own.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def parts_of(model: nn.Module) -> Iterator[nn.Module]:
    """Elements of the outermost ModuleLists whose parameters are nobody else's."""
    for module in _elements(model):
        own = {id(parameter) for parameter in module.parameters()}
        inner = {id(part) for part in module.modules()}
        others = {
            id(parameter)
            for part in model.modules()
            if id(part) not in inner
            for parameter in part.parameters(recurse=False)
        }
        if own and own.isdisjoint(others):
            yield module


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.ModuleList):
        yield from module
        return
    for child in module.children():
        yield from _elements(child)


def _parameter_of(stem: str, name: str) -> str:
    """The parameter whose shape a tensor of a file may have."""
    if stem == "ema":
        return name.partition("/")[2]
    return name if stem == "model" else name.rpartition("/")[0]


def _require_whole(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        what = None
        if parameter.dim() == 0:
            what = "a single number: give it the shape [1]"
        elif not parameter.is_contiguous():
            what = "not contiguous: leave memory formats such as channels_last out"
        elif not parameter.is_floating_point():
            what = f"of {parameter.dtype}"
        if what is not None:
            raise ExperimentError(f"distributed.strategy=fsdp cannot cut {name}, which is {what}")


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        flat: Any = parameter.detach().view(-1).view(torch.uint8).numpy()
        digest.update(flat.data)
    return digest.hexdigest()
