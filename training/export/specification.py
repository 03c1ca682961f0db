"""What goes into an exported model and what comes out: names, types, shapes, class names.

An experiment may have a sixth method, ``export_spec() -> ExportSpec``. What it leaves out is
derived from the model: input names from the signature of ``forward``, output names from the keys
of the dictionary or the fields of the named tuple that it returns.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.errors import ExportError
from holdfast.training.experiment.model_call import BY_POSITION, CallForm
from holdfast.training.experiment.protocol import Experiment

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class ExportSpec:
    """What an experiment says about its model's interface; everything is optional.

    Attributes:
        input_names: one per positional argument of ``forward``.
        output_names: one per output.
        class_names: output name -> the names of its last dimension.
        probes: further inputs that parity must hold on, e.g. shortest, longest, padded.
        description: one paragraph for the model card.
        task: what the model does, as Hugging Face calls it, e.g. ``image-classification``.
    """

    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    probes: Mapping[str, Inputs] = field(default_factory=dict)
    description: str = ""
    task: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. ``shape`` leaves out the first dimension, which counts samples."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class NamedOutputs(dict[str, Tensor]):
    """Outputs by name, as items and, as libraries of transformers have it, as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class OutputStructure:
    """How a model returns its outputs, and how flat outputs become that again.

    Attributes:
        names: one per output, in order.
        kind: ``tensor``, ``tuple`` or ``dict``.
        is_vector: the model returns ``[B]``, which is exported as ``[B, 1]``.
        fields: of a named tuple.
    """

    names: tuple[str, ...]
    kind: str
    is_vector: tuple[bool, ...]
    fields: tuple[str, ...] = ()

    def rebuild(self, flat: list[Tensor]) -> Any:
        """What the model itself would have returned."""
        own = [t[:, 0] if v else t for t, v in zip(flat, self.is_vector, strict=True)]
        if self.kind == "dict":
            return NamedOutputs(zip(self.names, own, strict=True))
        if self.fields:
            return namedtuple("Outputs", self.fields)(*own)  # its names are found here
        return own[0] if self.kind == "tensor" else tuple(own)


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of everything that is exported from one model.

    Attributes:
        form: how the model itself takes the inputs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    structure: OutputStructure
    class_names: Mapping[str, tuple[str, ...]]
    form: CallForm = BY_POSITION

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "class_names": {name: list(names) for name, names in self.class_names.items()},
            "inputs": [_tensor_json(tensor) for tensor in self.inputs],
            "outputs": [_tensor_json(tensor) for tensor in self.outputs],
        }


def export_spec(experiment: Experiment) -> ExportSpec:
    """What the experiment says about its export; empty where it says nothing."""
    own = getattr(experiment, "export_spec", None)
    if own is None:
        return ExportSpec()
    spec = own()
    if not isinstance(spec, ExportSpec):
        raise ExportError(
            f"export_spec() of {type(experiment).__name__} returned {type(spec).__name__}; "
            "it must return a holdfast.training.export.specification.ExportSpec"
        )
    return spec


def derive_interface(
    model: nn.Module, examples: Inputs, spec: ExportSpec, form: CallForm = BY_POSITION
) -> Interface:
    """The interface of ``model``, from one call of it on a batch of examples.

    Raises:
        ExportError: the model returns something else than tensors whose first dimension counts
            samples, or the names do not fit.
    """
    with torch.no_grad():
        returned = form.call(model, examples)
    structure, flat = _flatten(returned, spec.output_names)
    num_samples = len(examples[0])
    for name, tensor in zip(structure.names, flat, strict=True):
        if tensor.dim() == 0 or len(tensor) != num_samples:
            raise ExportError(
                f"output {name} has shape {list(tensor.shape)} for {num_samples} samples; "
                "the first dimension of every output must count samples"
            )
    names = spec.input_names or form.names or _argument_names(model, len(examples))
    if len(names) != len(examples) or len(set(names) | set(structure.names)) != len(names) + len(
        structure.names
    ):
        raise ExportError(
            f"input names {list(names)} and output names {list(structure.names)} must be distinct, "
            f"one for each of {len(examples)} inputs; correct export_spec() of the experiment"
        )
    return Interface(
        inputs=tuple(map(_tensor_spec, names, examples)),
        outputs=tuple(map(_tensor_spec, structure.names, map(as_columns, flat))),
        structure=structure,
        class_names=_checked_classes(spec.class_names, structure.names, flat),
        form=form,
    )


def flat_outputs(returned: Any) -> list[Tensor]:
    """The tensors that a model returned, in order: of a tensor, a tuple or a dictionary."""
    return _flatten(returned, ())[1]


def as_columns(tensor: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1]``: serving systems do not agree on what ``[B]`` is."""
    return tensor[:, None] if tensor.dim() == 1 else tensor


def dtype_name(dtype: torch.dtype) -> str:
    """NumPy's name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def _flatten(returned: Any, wanted: tuple[str, ...]) -> tuple[OutputStructure, list[Tensor]]:
    names: tuple[str, ...]
    if isinstance(returned, Tensor):
        kind, names, flat = "tensor", ("output",), [returned]
    elif isinstance(returned, Mapping):
        kind, names, flat = "dict", tuple(map(str, returned)), list(returned.values())
    elif isinstance(returned, (tuple, list)):
        kind, flat = "tuple", list(returned)
        names = getattr(returned, "_fields", tuple(f"output_{i}" for i in range(len(flat))))
    else:
        kind, names, flat = "tuple", (), []
    if not flat or not all(isinstance(tensor, Tensor) for tensor in flat):
        raise ExportError(
            f"the model returns {type(returned).__name__}; an exported model returns a tensor, "
            "or a tuple or dictionary of tensors"
        )
    if kind != "dict" and wanted:
        names = wanted
    if len(names) != len(flat):
        raise ExportError(f"the model returns {len(flat)} outputs, export_spec() names {names}")
    vectors = tuple(tensor.dim() == 1 for tensor in flat)
    fields = tuple(getattr(returned, "_fields", ())) if kind == "tuple" else ()
    return OutputStructure(names=names, kind=kind, is_vector=vectors, fields=fields), flat


def _argument_names(model: nn.Module, num: int) -> tuple[str, ...]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    positional = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL][:num]
    return tuple(positional) if len(positional) == num else tuple(f"input_{i}" for i in range(num))


def _checked_classes(
    class_names: Mapping[str, tuple[str, ...]], outputs: tuple[str, ...], flat: list[Tensor]
) -> Mapping[str, tuple[str, ...]]:
    widths = {name: tensor.shape[-1] for name, tensor in zip(outputs, flat, strict=True)}
    for name, classes in class_names.items():
        if widths.get(name) != len(classes):
            raise ExportError(
                f"class_names has {len(classes)} names for {name!r}; "
                f"the outputs and their last dimensions are {widths}"
            )
    return class_names


def _tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape[1:]))


def _tensor_json(tensor: TensorSpec) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "name": tensor.name, "shape": list(tensor.shape)}
