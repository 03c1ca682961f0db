"""The formats that a champion is exported to: one small protocol, one table.

To add a format, write a class with the four members of ``Format`` and add a row to ``FORMATS``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from holdfast.training.errors import ExportError
from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.specification import Inputs, Interface

MAX_MESSAGE_CHARS = 600


@dataclass(frozen=True)
class Place:
    """Where artifacts are written to and read from, and what reading them needs.

    Attributes:
        bundle: the bundle's folder; a format's ``path`` is relative to it.
        scratch: for what only the checks need: ``champion.safetensors``, and the ONNX graph
            before it was optimised, ``lineage.onnx``.
        build: a fresh model of the champion's class, for formats that are loaded into one.
    """

    bundle: Path
    scratch: Path
    build: Callable[[], torch.nn.Module]
    interface: Interface


@dataclass(frozen=True)
class Source:
    """The champion, ready to be exported.

    Attributes:
        model: the guarded champion in evaluation mode, on the CPU.
        examples: inputs of at least two samples; a single one would be taken for a constant.
        calibration: batches of training inputs.
    """

    model: GuardedModel
    interface: Interface
    examples: Inputs
    max_batch_size: int
    calibration: Callable[[], Iterator[Inputs]] = field(repr=False)

    @cached_property
    def program(self) -> ExportedProgram:
        """One capture, shared by all formats that are made from a graph."""
        return capture(self.model, self.examples, self.max_batch_size)


@dataclass(frozen=True)
class PortSignature:
    """What an artifact itself says about an input or output; ``None`` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Artifact(Protocol):
    """An exported model, loaded from its file."""

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Outputs in the order of the interface."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Weights by the champion's names, before any optimisation of the graph."""
        ...

    def signature(self) -> tuple[list[PortSignature], list[PortSignature]] | None:
        """Inputs and outputs as the file declares them; ``None`` where it declares nothing."""
        ...


class Format(Protocol):
    """How artifacts of one kind are written and read.

    Attributes:
        path: the artifact's file in a bundle.
        is_exact: the artifact must compute what the champion computes, to rounding; others are
            held to the task metric alone.
    """

    path: str
    is_exact: bool

    def write(self, source: Source, place: Place) -> None:
        """Write the artifact; the same champion gives the same bytes."""
        ...

    def load(self, place: Place) -> Artifact:
        """Read it back."""
        ...


def capture(model: GuardedModel, examples: Inputs, max_batch_size: int) -> ExportedProgram:
    """The model's graph with a dynamic batch.

    Raises:
        ExportError: the examples are a single sample, the model is in training mode, or torch
            cannot capture it.
    """
    if len(examples[0]) < 2:
        raise ExportError("an export needs at least 2 example samples, found 1: a batch of 1 is "
                          "taken for a constant")  # fmt: skip
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise ExportError(f"modules {training[:3]} are in training mode; call eval() first")
    batch = torch.export.Dim("batch", min=1, max=max_batch_size)
    # The fast path zeroes padded positions, which no other runtime does.
    had_fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            # torch's own LSTM and GRU set this attribute whenever they are moved.
            warnings.filterwarnings("ignore", r"The tensor attributes .*_flat_weights", UserWarning)
            program = torch.export.export(
                copy.deepcopy(model),
                examples,
                dynamic_shapes={"inputs": tuple({0: batch} for _ in examples)},
                strict=False,
            )
    except Exception as error:  # torch raises its own, many and private, classes
        raise ExportError(
            f"torch.export cannot capture the model: {str(error)[:MAX_MESSAGE_CHARS]}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(had_fastpath)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds the paths of this machine
    return program


def unused_tensors(program: ExportedProgram) -> set[str]:
    """Parameters and buffers of the champion that its graph does not use."""
    from holdfast.training.export.guard import PREFIX

    signature = program.graph_signature
    by_node = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {
        by_node[node.name].removeprefix(PREFIX)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in by_node and not node.users
    }


def formats() -> dict[str, Format]:
    """The table of formats, in the order in which they are made."""
    from holdfast.training.export.exported_program import ExportedProgramFormat
    from holdfast.training.export.int8 import Int8OnnxFormat
    from holdfast.training.export.onnx_export import OnnxFormat
    from holdfast.training.export.torchscript import TorchScriptFormat
    from holdfast.training.export.weights import WeightsFormat

    return {
        "weights": WeightsFormat(),
        "onnx": OnnxFormat(),
        "exported_program": ExportedProgramFormat(),
        "torchscript": TorchScriptFormat(),
        "onnx_int8": Int8OnnxFormat(),
    }
