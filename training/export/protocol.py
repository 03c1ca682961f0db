"""What an export format is: the champion that it is given, and the artifact that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from holdfast.training.export.capturing import capture
from holdfast.training.export.guard import GuardedModel
from holdfast.training.export.specification import Inputs, Interface

Runner = Callable[[Inputs], list[Tensor]]
"""Anything that maps inputs to flat outputs: the model, or an artifact in its runtime."""


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
        return capture(self.model, self.examples, self.max_batch_size, self.interface.inputs)


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

    def tensors(self) -> Mapping[str, Tensor]:
        """Weights by the champion's names, before any optimisation of the graph.

        Each may be read from a file whenever it is asked for.
        """
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
