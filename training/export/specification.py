"""What goes into an exported model and what comes out: names, types, shapes, class names.

An experiment may have a sixth method, ``export_spec() -> ExportSpec``. What it leaves out is
derived from the model: input names from the signature of ``forward``, output names from the keys
of the dictionary or the fields of the named tuple or dataclass that it returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.errors import ExportError, kind_of
from holdfast.training.experiment.model_call import BY_POSITION, CallForm, forward_parameters
from holdfast.training.experiment.protocol import Experiment
from holdfast.training.export.outputs import OutputStructure, as_columns, flatten

Inputs = tuple[Tensor, ...]
Size = int | str
"""Of a dimension; its name where it may vary."""
Dimensions = Mapping[str, Mapping[int, str]]
"""Input name -> dimension -> the name of its size, for those beside the first one that may vary."""


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
    shape: tuple[Size, ...]


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
            f"export_spec() of {type(experiment).__name__} returned {kind_of(spec)}; "
            "it must return a holdfast.training.export.specification.ExportSpec"
        )
    return spec


def derive_interface(
    model: nn.Module,
    examples: Inputs,
    spec: ExportSpec,
    form: CallForm = BY_POSITION,
    others: Sequence[Inputs] = (),
    dimensions: Dimensions = {},  # noqa: B006  # nobody writes to it
) -> Interface:
    """The interface of ``model``, from one call of it on a batch of examples.

    Args:
        model: in evaluation mode.
        examples: inputs, flat.
        spec: what the experiment says.
        form: how the model takes the inputs.
        others: inputs of other sizes, where ``dimensions`` may vary.
        dimensions: of inputs, by the names that the interface gives them.

    Raises:
        ExportError: the model returns something else than tensors whose first dimension counts
            samples, or the names do not fit.
    """
    structure, flat = _answer(model, examples, spec, form)
    names = interface_names(model, len(examples), spec, form)
    if len(names) != len(examples) or len(set(names) | set(structure.names)) != len(names) + len(
        structure.names
    ):
        raise ExportError(
            f"input names {list(names)} and output names {list(structure.names)} must be distinct, "
            f"one for each of {len(examples)} inputs; correct export_spec() of the experiment"
        )
    outputs = list(map(_tensor_spec, structure.names, map(as_columns, flat)))
    inputs = [
        _with_names(_tensor_spec(n, x), dimensions.get(n, {}))
        for n, x in zip(names, examples, strict=True)
    ]
    if dimensions:
        tried = [(x, _answer(model, x, spec, form)[1]) for x in others]
        outputs = _varying(inputs, outputs, [(examples, flat), *tried])
    return Interface(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        structure=structure,
        class_names=_checked_classes(spec.class_names, structure.names, flat),
        form=form,
    )


def interface_names(
    model: nn.Module, num_inputs: int, spec: ExportSpec, form: CallForm
) -> tuple[str, ...]:
    """Names of the inputs: those that the experiment gives, or those of their arguments."""
    return spec.input_names or form.names or _argument_names(model, num_inputs)


def fits(sizes: Sequence[int], shape: Sequence[Size]) -> bool:
    """Whether a shape is the one that is wanted; a size that may vary is any."""
    return len(sizes) == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(sizes, shape, strict=True)
    )


def sizes_by_name(inputs: Sequence[TensorSpec], tensors: Inputs) -> dict[str, int]:
    """The sizes of the dimensions that may vary. Raises ExportError where one name has two."""
    found: dict[str, int] = {}
    for port, tensor in zip(inputs, tensors, strict=True):
        for dimension, size in enumerate(port.shape, start=1):
            if not isinstance(size, str):
                continue
            if found.setdefault(size, tensor.shape[dimension]) != tensor.shape[dimension]:
                raise ExportError(
                    f"dynamic_dimensions calls two sizes {size!r} that differ in one batch: "
                    f"{found[size]}, and {tensor.shape[dimension]} in dimension {dimension} of "
                    f"{port.name}; give each a name of its own"
                )
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """NumPy's name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def _answer(
    model: nn.Module, inputs: Inputs, spec: ExportSpec, form: CallForm
) -> tuple[OutputStructure, list[Tensor]]:
    with torch.no_grad():
        returned = form.call(model, inputs)
    structure, flat = flatten(returned, spec.output_names)
    num_samples = len(inputs[0])
    for name, tensor in zip(structure.names, flat, strict=True):
        if tensor.dim() == 0 or len(tensor) != num_samples:
            raise ExportError(
                f"output {name} has shape {list(tensor.shape)} for {num_samples} samples; "
                "the first dimension of every output must count samples"
            )
    return structure, flat


def _varying(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    answers: Sequence[tuple[Inputs, list[Tensor]]],
) -> list[TensorSpec]:
    """Outputs with names for sizes that differ from one answer to the other.

    That is the name of the inputs' size that it equals, or one of its own.
    """
    by_name = [sizes_by_name(inputs, asked) for asked, _ in answers]
    found = []
    for number, port in enumerate(outputs):
        shapes = [tuple(as_columns(flat[number]).shape[1:]) for _, flat in answers]
        if len({len(shape) for shape in shapes}) > 1:
            raise ExportError(
                f"output {port.name} has another number of dimensions for inputs of another size: "
                f"{list(shapes[0])}, {list(shapes[-1])}; leave it out of what forward() returns"
            )
        named: dict[int, str] = {}
        for dimension, sizes in enumerate(zip(*shapes, strict=True), start=1):
            if len(set(sizes)) > 1:
                pairs = list(zip(by_name, sizes, strict=True))
                same = [n for n in by_name[0] if all(known[n] == size for known, size in pairs)]
                named[dimension] = same[0] if same else f"{port.name}_{dimension}"
        found.append(_with_names(port, named))
    return found


def _with_names(port: TensorSpec, names: Mapping[int, str]) -> TensorSpec:
    shape = (names.get(number, size) for number, size in enumerate(port.shape, start=1))
    return replace(port, shape=tuple(shape))


def _argument_names(model: nn.Module, num: int) -> tuple[str, ...]:
    parameters = list(forward_parameters(model).values())
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
