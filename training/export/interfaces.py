"""The interface of an experiment's model, from samples of its data, whose sizes may vary.

An experiment may have a class attribute ``dynamic_dimensions``: input name -> dimension -> the name
of its size. Such a size is proved at several values, so samples of several sizes are looked for in
the validation split; each is batched with its likes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from holdfast.training.errors import ExportError
from holdfast.training.experiment.model_call import CallForm, call_form
from holdfast.training.experiment.protocol import (
    Experiment,
    collate,
    example_inputs,
    input_names,
    model_inputs,
)
from holdfast.training.export.specification import (
    Dimensions,
    ExportSpec,
    Inputs,
    Interface,
    TensorSpec,
    derive_interface,
    export_spec,
    interface_names,
    sizes_by_name,
)

NUM_LOOKED_AT = 256
NUM_OF_A_SIZE = 3
NAME = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
OF_THE_BATCH = "batch"


@dataclass(frozen=True)
class Opened:
    """A model's interface, and inputs to try it on.

    Attributes:
        rows: inputs of the first validation samples.
        form: how the model takes them.
        by_size: inputs of the least, a middle and the greatest size, by what tells it; empty where
            no size but the batch's may vary.
    """

    rows: Inputs
    form: CallForm
    interface: Interface
    by_size: Mapping[str, Inputs] = field(default_factory=dict)

    @property
    def examples(self) -> Inputs:
        """Inputs to capture a graph from: those of the greatest size, where sizes may vary."""
        return list(self.by_size.values())[-1] if self.by_size else self.rows


def open_interface(experiment: Experiment, model: nn.Module, num_samples: int) -> Opened:
    """The interface of the experiment's model, with ``num_samples`` inputs.

    Raises:
        ExperimentError: the inputs of a batch are no tensors.
        ExportError: the outputs are none, or ``dynamic_dimensions`` does not fit the samples.
    """
    rows = example_inputs(experiment, num_samples)
    form, spec = call_form(experiment, model), export_spec(experiment)
    dimensions = _declared(experiment)
    if not dimensions:
        return Opened(rows, form, derive_interface(model, rows, spec, form))
    names = interface_names(model, len(rows), spec, form)
    ports = _ports(names, rows, dimensions)
    by_size = _inputs_by_size(experiment, ports)
    others = [*by_size.values(), *spec.probes.values()]
    _require_several(ports, by_size, spec)
    interface = derive_interface(model, rows, spec, form, others, dimensions)
    return Opened(rows, form, interface, by_size)


def _declared(experiment: object) -> Dimensions:
    """The experiment's ``dynamic_dimensions``. Raises ExportError where it is malformed."""
    found: Any = getattr(experiment, "dynamic_dimensions", {})
    is_nested = isinstance(found, Mapping) and all(isinstance(d, Mapping) for d in found.values())
    pairs = [pair for inner in found.values() for pair in inner.items()] if is_nested else [(0, "")]
    for number, name in pairs:
        is_number = type(number) is int and number >= 1
        if not is_number or not isinstance(name, str) or not NAME.fullmatch(name):
            raise ExportError(
                f"dynamic_dimensions of {type(experiment).__name__} must be like "
                f'{{"input_ids": {{1: "length"}}}}: dimensions from 1 on, since the first one '
                f"counts samples, with a name for their size; found {found!r}"
            )
        if name == OF_THE_BATCH:
            raise ExportError(
                f"dynamic_dimensions calls a size {name!r}, as the number of samples is called: "
                f"take another name"
            )
    return {name: dict(inner) for name, inner in found.items() if inner}


def _ports(names: Sequence[str], rows: Inputs, dimensions: Dimensions) -> tuple[TensorSpec, ...]:
    """The inputs with the sizes that may vary. Raises ExportError where there is no such one."""
    for name, inner in dimensions.items():
        if name not in names:
            raise ExportError(
                f"dynamic_dimensions names the input {name}; the model has {', '.join(names)}"
            )
        shape = list(rows[list(names).index(name)].shape)
        if max(inner) >= len(shape):
            raise ExportError(
                f"dynamic_dimensions names dimension {max(inner)} of {name}, which has the shape "
                f"{shape}"
            )
    return tuple(
        TensorSpec(
            name,
            "",
            tuple(
                dimensions.get(name, {}).get(number, size)
                for number, size in enumerate(tensor.shape[1:], start=1)
            ),
        )
        for name, tensor in zip(names, rows, strict=True)
    )


def _inputs_by_size(experiment: Experiment, ports: Sequence[TensorSpec]) -> dict[str, Inputs]:
    """A few samples each of the least, a middle and the greatest size."""
    dataset, names = experiment.dataset("validation"), input_names(experiment)
    num = min(len(dataset), NUM_LOOKED_AT)
    items = [dataset[number * len(dataset) // num] for number in range(num)]

    def batched(chosen: Sequence[int]) -> Inputs:
        return model_inputs(collate(dataset, [items[number] for number in chosen]), names)

    sizes = [tuple(sizes_by_name(ports, batched([number])).values()) for number in range(num)]
    order = sorted(range(num), key=sizes.__getitem__)
    found: dict[str, Inputs] = {}
    for first in (0, num // 2, num - 1):
        start = min(first, max(0, num - NUM_OF_A_SIZE))
        inputs = batched([order[min(start + i, num - 1)] for i in range(NUM_OF_A_SIZE)])
        told = [f"{name}-{size}" for name, size in sizes_by_name(ports, inputs).items()]
        found.setdefault("-".join(told), inputs)
    return found


def _require_several(
    ports: Sequence[TensorSpec], by_size: Mapping[str, Inputs], spec: ExportSpec
) -> None:
    """Raise ExportError where a size that may vary does not, so that nothing would be proved."""
    tried = [sizes_by_name(ports, inputs) for inputs in (*by_size.values(), *spec.probes.values())]
    for name in tried[0]:
        sizes = {sizes[name] for sizes in tried}
        if len(sizes) == 1:
            raise ExportError(
                f"dynamic_dimensions says that {name} varies, and it is {min(sizes)} in all "
                f"validation samples, so that nothing would be proved of it: leave it out, or give "
                f"inputs of another {name} as probes in export_spec()"
            )
    if 1 in sizes_by_name(ports, list(by_size.values())[-1]).values():
        raise ExportError(
            f"the greatest sizes of validation samples are {list(by_size)[-1]}; a graph is "
            f"captured from varying sizes of 2 at least, since 1 is taken for a constant"
        )
