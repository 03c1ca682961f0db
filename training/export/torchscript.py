"""TorchScript by tracing: for programs that load models with libtorch.

PyTorch calls TorchScript deprecated; new consumers should take ONNX or ``.pt2``.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.jit._trace import TracerWarning

from holdfast.training.errors import ExportError
from holdfast.training.export.archives import rewrite_reproducibly
from holdfast.training.export.capturing import MAX_MESSAGE_CHARS
from holdfast.training.export.class_names import first_names
from holdfast.training.export.guard import PREFIX
from holdfast.training.export.protocol import Place, PortSignature, Source
from holdfast.training.export.specification import Inputs


class TorchScriptArtifact:
    """A traced module."""

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._module = torch.jit.load(  # type: ignore[no-untyped-call]
                str(path), map_location="cpu"
            )

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Outputs of the traced module."""
        with torch.no_grad():
            return list(self._module(*inputs))

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters and buffers."""
        named = [*self._module.named_parameters(), *self._module.named_buffers()]
        return {name.removeprefix(PREFIX): tensor.detach() for name, tensor in named}

    def signature(self) -> tuple[list[PortSignature], list[PortSignature]] | None:
        """A traced module declares neither types nor shapes."""
        return None


class TorchScriptFormat:
    """``torchscript/model.pt``; marked as legacy, as PyTorch does."""

    path = "torchscript/model.pt"
    is_exact = True

    def write(self, source: Source, place: Place) -> None:
        """Trace, save, and strip what names this machine. Raises ExportError."""
        target = place.bundle / self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _trace(source, target)
        except RuntimeError as error:
            message = " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
            raise ExportError(f"torch.jit cannot trace the model: {message}") from error
        rewrite_reproducibly(target, "model")

    def load(self, place: Place) -> TorchScriptArtifact:
        """Load it with torch alone."""
        return TorchScriptArtifact(place.bundle / self.path)


def _trace(source: Source, target: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad(), first_names(source.model):
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            source.model, source.examples, check_trace=False
        )
        torch.jit.save(traced, str(target))
