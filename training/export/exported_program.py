"""``torch.export``'s own format, ``.pt2``: PyTorch's successor of TorchScript."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from holdfast.training.export.archives import rewrite_reproducibly
from holdfast.training.export.guard import PREFIX
from holdfast.training.export.protocol import Place, PortSignature, Source
from holdfast.training.export.specification import Inputs, Interface, dtype_name


class ExportedProgramArtifact:
    """A loaded exported program."""

    def __init__(self, path: Path, interface: Interface) -> None:
        self._program = torch.export.load(path)
        self._interface = interface
        self._module = self._program.module()

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Outputs of the graph."""
        with torch.no_grad():
            return list(self._module(*inputs))

    def tensors(self) -> dict[str, Tensor]:
        """Its state dict."""
        state = self._program.state_dict
        return {name.removeprefix(PREFIX): tensor.detach() for name, tensor in state.items()}

    def signature(self) -> tuple[list[PortSignature], list[PortSignature]]:
        """Types and shapes of the graph's user inputs and outputs."""
        nodes = {node.name: node for node in self._program.graph.nodes}
        signature = self._program.graph_signature
        wanted_inputs = [port.name for port in self._interface.inputs]
        wanted_outputs = [port.name for port in self._interface.outputs]
        return (
            [_port(name, nodes[str(node)].meta["val"])
             for name, node in zip(wanted_inputs, signature.user_inputs, strict=True)],
            [_port(name, nodes[str(node)].meta["val"])
             for name, node in zip(wanted_outputs, signature.user_outputs, strict=True)],
        )  # fmt: skip


class ExportedProgramFormat:
    """``exported_program/model.pt2``."""

    path = "exported_program/model.pt2"
    is_exact = True

    def write(self, source: Source, place: Place) -> None:
        """Save the capture without its example inputs."""
        target = place.bundle / self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        program = copy.copy(source.program)
        program.example_inputs = None
        torch.export.save(program, target)
        rewrite_reproducibly(target, "model")

    def load(self, place: Place) -> ExportedProgramArtifact:
        """Load it with torch alone."""
        return ExportedProgramArtifact(place.bundle / self.path, place.interface)


def _port(name: str, value: Tensor) -> PortSignature:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return PortSignature(name, dtype_name(value.dtype), shape)
