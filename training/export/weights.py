"""The champion's weights alone, as safetensors: what is needed to go on in PyTorch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast.training.checkpointing.json_state import decode
from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.model_weights import split_state, take_buffers
from holdfast.training.checkpointing.tensor_file import MappedFile, parse_layout, parse_tensors
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import CheckpointCorruptError, ExportError, StorageError
from holdfast.training.experiment.model_call import CallForm
from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.protocol import Place, PortSignature, Source
from holdfast.training.export.specification import Inputs


class WeightsArtifact:
    """A fresh model with the weights of the file."""

    def __init__(self, path: Path, model: nn.Module, form: CallForm) -> None:
        self._tensors = StoredTensors(path)
        self._model = GuardedModel(load_champion(path, model), form)

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Outputs of eager PyTorch."""
        with torch.no_grad():
            return list(self._model(*inputs))

    def tensors(self) -> Mapping[str, Tensor]:
        """What the file holds."""
        return self._tensors

    def signature(self) -> tuple[list[PortSignature], list[PortSignature]] | None:
        """Weights declare no interface."""
        return None


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file under all their names, each read when it is asked for.

    Raises CheckpointCorruptError where it is none, or StorageError.
    """

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        layout = self._file.layout
        self._stored = {**{name: name for name in layout.slots}, **layout.aliases}

    def __getitem__(self, name: str) -> Tensor:
        """Read one."""
        stored = self._stored[name]
        tensor = self._file.tensor(stored)
        read = tensor.clone()
        if tensor.numel():
            self._file.release(stored, 0, tensor.numel())
        return read

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._stored)

    def __len__(self) -> int:
        """How many names there are."""
        return len(self._stored)


class WeightsFormat:
    """``model.safetensors``: a copy of the champion's file."""

    path = "model.safetensors"
    is_exact = True

    def write(self, source: Source, place: Place) -> None:  # noqa: ARG002 - the protocol's
        """Copy the champion's file from ``scratch/champion.safetensors``."""
        shutil.copyfile(place.scratch / "champion.safetensors", place.bundle / self.path)

    def load(self, place: Place) -> WeightsArtifact:
        """Load it into a fresh model."""
        return WeightsArtifact(place.bundle / self.path, place.build(), place.interface.form)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; tied ones are the same tensor under each of their names.

    Raises ExportError where the file is missing or is no safetensors file.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Json]]:
    try:
        content, _ = read_file(path, "sha256")
        layout, _ = parse_layout(content.numpy().data, path.name)
        return parse_tensors(content, path.name), layout.extra_state
    except (CheckpointCorruptError, StorageError) as error:
        raise ExportError(f"the champion cannot be read: {error}") from error


def load_champion(path: Path, model: nn.Module) -> nn.Module:
    """``model`` with the weights of ``path``, in evaluation mode, on the CPU.

    A tensor that is tied to another stands in the file once, with its other names beside it, or
    without them where safetensors' own ``save_model`` wrote it. Buffers take the shape and type of
    what is loaded, as at a restore: observers of quantisation begin with others.

    Raises:
        ExportError: a tensor is missing or left over, or a parameter has another shape or type.
    """
    stored, extra_state = _read(path)
    take_buffers(model.cpu(), stored)
    _take_extra_state(model, extra_state)
    target, _ = split_state(model.state_dict(keep_vars=True))
    groups = tied_names(model)
    left_over = set(stored)
    for name, tensor in target.items():
        found = next((other for other in groups[name] if other in stored), None)
        if found is None:
            raise ExportError(f"the champion {path.name} has no tensor {name} that the model needs")
        value = stored[found]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ExportError(
                f"tensor {name}: the model has {tensor.dtype} {list(tensor.shape)}, the champion "
                f"{path.name} has {value.dtype} {list(value.shape)}"
            )
        left_over.discard(found)
        with torch.no_grad():
            tensor.copy_(value)
    if left_over:
        raise ExportError(f"the champion {path.name} has tensors {sorted(left_over)[:3]} that the "
                          "model does not have")  # fmt: skip
    return model.eval()


def _take_extra_state(model: nn.Module, stored: Mapping[str, Json]) -> None:
    """Give modules what they keep beside tensors."""
    for name, value in stored.items():
        owner, _, _ = name.rpartition(".")
        model.get_submodule(owner).set_extra_state(decode(value, {}))


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Tensor name -> all names of the same storage, its own first."""
    state, _ = split_state(model.state_dict(keep_vars=True))
    places: dict[tuple[int, int], list[str]] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.numel()) if tensor.numel() else (0, -1 - len(places))
        places.setdefault(key, []).append(name)
    return {
        name: [name, *(other for other in names if other != name)]
        for names in places.values()
        for name in names
    }
