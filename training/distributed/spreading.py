"""Weights, gradients, optimizer and averages in slices on the ranks: torch's ``fully_shard``.

For a checkpoint each rank writes its own slices, and rank 0 what all have whole; each takes its
slices of what is restored, whoever has written it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from holdfast.training.checkpointing.finite import local_part
from holdfast.training.checkpointing.slices import Part, Region
from holdfast.training.distributed.slice_sums import TreeScatter
from holdfast.training.distributed.world import World
from holdfast.training.errors import ExperimentError, UnsupportedStateError

Tensors = Mapping[str, Mapping[str, Tensor]]


class Spread:
    """The slices of a model on the ranks of a training.

    Attributes:
        first_digest: of the whole weights that this rank began with.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        parallelize: Callable[[nn.Module, DeviceMesh], object] | None = None,
        *,
        is_in_tree: bool = False,
    ) -> None:
        """Collective. Put each rank's slices in the place of the model's parameters.

        ``parallelize`` wraps parts of the model with the given mesh; without it, each element of a
        ModuleList is a part. What is in no part is one together. With ``is_in_tree`` gradients
        are summed in one order for any number of ranks that is a power of two.

        Raises ExperimentError for a parameter that cannot be cut.
        """
        require_sliceable(model)
        self._rank, self._size = world.rank, world.size
        self.first_digest = _digest(model)
        kinds = [parameter.device.type for parameter in model.parameters()]
        mesh = init_device_mesh(kinds[0] if kinds else "cpu", (world.size,))
        if parallelize is None:
            for part in parts_of(model):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        else:
            parallelize(model, mesh)
        if not isinstance(model, FSDPModule):
            fully_shard(model, mesh=mesh)  # the backward pass begins with what is whole then
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if is_in_tree:
                module.set_custom_reduce_scatter(TreeScatter(world))
        self._slices = {
            name: parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if isinstance(parameter, DTensor)
        }
        if is_in_tree:
            self._require_plain(mesh)

    def begin_pass(self, *, is_last: bool) -> None:
        """Before each forward and backward pass of a step: gradients are summed in the last one."""
        for module in self._modules:
            module.set_requires_gradient_sync(is_last, recurse=False)

    def end_scoring(self) -> None:
        """After forward passes that no backward pass follows: each parameter is a slice again."""
        for module in self._modules:
            module.reshard()

    def part(self, stem: str, tensors: Mapping[str, Tensor]) -> Part | None:
        """What this rank writes of a stem: its slices, and as rank 0 all that is whole.

        None where there is nothing. Raises UnsupportedStateError for a slice that a resume could
        not put back.
        """
        for name, tensor in tensors.items():
            self._require_shape(stem, name, tensor)
        is_first = self._rank == 0
        if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            return Part(stem, tensors) if is_first else None
        regions = {name: self.region_of(tensor) for name, tensor in tensors.items()}
        own = {
            name: tensor
            for name, tensor in tensors.items()
            if is_first or (isinstance(tensor, DTensor) and 0 not in regions[name].shape)
        }
        return Part(
            f"{stem}-{self._rank + 1:05d}-of-{self._size:05d}",
            {name: local_part(tensor) for name, tensor in own.items()},
            {name: regions[name].offsets for name in own},
            {name: tuple(tensor.shape) for name, tensor in own.items()},
        )

    def region(self, stem: str, name: str, shape: tuple[int, ...]) -> Region:
        """What this rank keeps of a tensor of this shape."""
        own = self._own(stem, name, shape)
        return Region.whole(shape) if own is None else self.region_of(own)

    def put(self, stem: str, name: str, shape: tuple[int, ...], own: Tensor) -> Tensor:
        """The tensor of which ``own`` is this rank's slice, or all."""
        like = self._own(stem, name, shape)
        if like is None:
            return own
        mesh, placements = like.device_mesh, like.placements
        return DTensor.from_local(
            own, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    @staticmethod
    def region_of(tensor: Tensor) -> Region:
        """Which part of a tensor this rank has."""
        if not isinstance(tensor, DTensor):
            return Region.whole(tensor.shape)
        shape, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return Region(tuple(offsets), tuple(shape))

    def sliced(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """This rank's slices of whole tensors; what lies in no slices stays as it is."""
        return {
            stem: {name: self._slice(stem, name, tensor) for name, tensor in inner.items()}
            for stem, inner in tensors.items()
        }

    def _require_plain(self, mesh: DeviceMesh) -> None:
        """With ``num_shards`` one process alone, which has no slices, computes the same."""
        modules: list[Any] = self._modules
        policies = [module._get_fsdp_state()._mp_policy for module in modules]
        own = {(tensor.device_mesh, tensor.placements) for tensor in self._slices.values()}
        if any(policy != MixedPrecisionPolicy() for policy in policies):
            what = "casts by a MixedPrecisionPolicy"
        elif own - {(mesh, (Shard(0),))}:
            what = "cuts otherwise than into rows on the mesh that it was given"
        else:
            return
        raise ExperimentError(
            f"parallelize() {what}, and with distributed.num_shards one process alone must compute "
            f"the same: leave that out, or num_shards"
        )

    def _require_shape(self, stem: str, name: str, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor) and self._own(stem, name, tuple(tensor.shape)) is None:
            raise UnsupportedStateError(
                f"{stem}.{name} lies in slices and has not the shape of a parameter, so a resume "
                f"could not put it back: with distributed.strategy=fsdp use an optimizer whose "
                f"state has its parameters' shapes, such as AdamW or SGD"
            )

    def _slice(self, stem: str, name: str, tensor: Tensor) -> Tensor:
        own = self._own(stem, name, tuple(tensor.shape))
        if own is None or isinstance(tensor, DTensor):
            return tensor
        mesh, placements = own.device_mesh, own.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    def _own(self, stem: str, name: str, shape: tuple[int, ...]) -> DTensor | None:
        """The parameter whose slices are laid out as those of a tensor of a file."""
        own = self._slices.get(_parameter_of(stem, name))
        return own if own is not None and tuple(own.shape) == shape else None


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


def require_sliceable(model: nn.Module) -> None:
    """Raise ExperimentError for a parameter that cannot be cut."""
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
        flat: Any = parameter.detach().cpu().view(-1).view(torch.uint8).numpy()
        digest.update(flat.data)
    return digest.hexdigest()
