"""ONNX: the artifact that runs everywhere, and the one that consumers verify.

The graph is written twice: as captured, where every tensor of the champion still stands under its
own name and bit by bit (that is what the lineage check reads), and optimised, which is twice as
fast for small batches and goes into the bundle.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo
from torch import Tensor

from holdfast.training.errors import ExportError
from holdfast.training.export.guard import PREFIX
from holdfast.training.export.protocol import Place, PortSignature, Source
from holdfast.training.export.specification import Inputs, Interface

OPSET = 20  # from 23 on, ONNX Runtime fails on the CPU for models with padding masks
MAX_REASON_CHARS = 300
MAX_BYTES = 2_000_000_000  # a protobuf file ends at 2 GB
LENGTH_DELIMITED = 2  # what protobuf calls a field that stands behind its length
GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
CHUNK_BYTES = 1 << 20
CHATTY_LOGGERS = ("torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
LINEAGE = "lineage.onnx"  # its tensors are in a file beside it, where each is read by itself
BESIDE = "optimised.onnx"
WITHOUT_ONNX = "leave onnx out of export.formats"
TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
ORT_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint64)": "uint64",
    "tensor(uint32)": "uint32",
    "tensor(uint16)": "uint16",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxArtifact:
    """A model in ONNX Runtime, on the CPU.

    ``lineage`` is the graph before it was optimised; ``None`` where there is none to check.
    """

    def __init__(self, path: Path, lineage: Path | None, num_threads: int = 1) -> None:
        self._session = open_session(path, num_threads)
        self._lineage = lineage

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Outputs of the session."""
        names = [port.name for port in self._session.get_inputs()]
        feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.array(output)) for output in self._session.run(None, feed)]

    def tensors(self) -> Mapping[str, Tensor]:
        """Initializers of the graph before it was optimised."""
        return {} if self._lineage is None else Initializers(self._lineage)

    def signature(self) -> tuple[list[PortSignature], list[PortSignature]]:
        """Types and shapes as ONNX Runtime reads them from the file."""
        return (
            [_port(port) for port in self._session.get_inputs()],
            [_port(port) for port in self._session.get_outputs()],
        )


class Initializers(Mapping[str, Tensor]):
    """The initializers of a graph whose large ones lie beside it, each read when it is asked for.

    By the champion's names.
    """

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        self._stored = {tensor.name.removeprefix(PREFIX): tensor for tensor in graph.initializer}
        self._folder = str(path.parent)

    def __getitem__(self, name: str) -> Tensor:
        """Read one."""
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._stored[name])  # into which its bytes are read
        return torch.from_numpy(numpy_helper.to_array(tensor, self._folder).copy())

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._stored)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._stored)


class OnnxFormat:
    """``1/model.onnx``: one file, opset 20, dynamic batch and whatever else may vary."""

    path = "1/model.onnx"
    is_exact = True

    def write(self, source: Source, place: Place) -> None:
        """Export the capture; keep the graph before optimisation in scratch.

        Raises:
            ExportError: torch cannot translate the graph, or wrote another opset than asked for,
                or the file would be above 2 GB, or ONNX Runtime cannot compute in its type.
        """
        _require_types(source)
        target = place.bundle / self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        program = translate(source)
        with _quiet():
            program.save(place.scratch / LINEAGE, external_data=True)
            program.optimize()
            _write(program, target, place.scratch, source.interface)

    def load(self, place: Place) -> OnnxArtifact:
        """Load it with ONNX Runtime."""
        return OnnxArtifact(place.bundle / self.path, place.scratch / LINEAGE)


def translate(source: Source) -> Any:
    """The capture as an ``ONNXProgram``, not optimised."""
    with _quiet():
        try:
            return torch.onnx.export(
                source.program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[port.name for port in source.interface.inputs],
                output_names=[port.name for port in source.interface.outputs],
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # torch raises its own, many and private, classes
            raise ExportError(
                f"torch.onnx cannot translate the model: {_reason(error)}; {WITHOUT_ONNX}, or let "
                f"the model do without it"
            ) from error


def _require_types(source: Source) -> None:
    """ONNX Runtime has hardly a kernel for bfloat16 on a CPU, and NumPy no such type."""
    ports = [*source.interface.inputs, *source.interface.outputs]
    found = [port.name for port in ports if port.dtype == "bfloat16"]
    found += [name for name, p in source.model.named_parameters() if p.dtype == torch.bfloat16]
    if found:
        raise ExportError(
            f"{found[0].removeprefix(PREFIX)} is bfloat16, which ONNX Runtime does not compute "
            f"with on a CPU: {WITHOUT_ONNX}, or build the model in fp32 and train it with "
            f"train.precision=bf16"
        )


def _reason(error: Exception) -> str:
    """The first cause, in one line without colours."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = " ".join(TERMINAL_COLOURS.sub("", str(error)).split())
    return f"{type(error).__name__}: {text[:MAX_REASON_CHARS]}"


def open_session(path: Path, num_threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU with a fixed number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter says about missing packages, its own deprecations and every pass."""
    loggers = [logging.getLogger(name) for name in CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write(program: Any, path: Path, scratch: Path, interface: Interface) -> None:
    """Write a program as one file.

    In one piece its tensors would be in memory three times more, so torch writes them beside the
    graph, from where they are copied.
    """
    beside = scratch / BESIDE
    program.save(beside, external_data=True)
    model = onnx.load(beside, load_external_data=False)
    _strip(model)
    _name_sizes(model, interface)
    written = {entry.domain: entry.version for entry in model.opset_import}
    if written.get("") != OPSET:
        raise ExportError(f"torch.onnx wrote opset {written.get('')}, {OPSET} was asked for")
    parts = whole_model(model, scratch)
    if (num_bytes := _size(parts)) > MAX_BYTES:
        raise ExportError(
            f"the ONNX file would have {num_bytes} bytes; one file holds at most {MAX_BYTES}"
        )
    with path.open("wb") as file:
        for part in parts:
            file.writelines(part.chunks() if isinstance(part, Stretch) else [part])
    for left in scratch.glob(f"{BESIDE}*"):
        left.unlink()


@dataclass(frozen=True)
class Stretch:
    """Bytes of a file."""

    path: Path
    start: int
    num_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a few at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for done in range(0, self.num_bytes, CHUNK_BYTES):
                yield file.read(min(CHUNK_BYTES, self.num_bytes - done))


Part = bytes | Stretch


def whole_model(model: onnx.ModelProto, folder: Path) -> list[Part]:
    """The file of a model whose tensors lie in a file of ``folder``, as if they were in the model.

    It is what ``SerializeToString(deterministic=True)`` gives: in protobuf the fields of a message
    lie in the order of their numbers, and a message within another behind a key and its length.
    Takes the tensors out of the model.
    """
    tensors = [_inside(INITIALIZER, _tensor(each, folder)) for each in model.graph.initializer]
    del model.graph.initializer[:]
    begin, end = _around(model.graph, INITIALIZER)
    graph = _inside(GRAPH, [begin, *chain.from_iterable(tensors), end])
    begin, end = _around(model, GRAPH)
    return [begin, *graph, end]


def _tensor(tensor: onnx.TensorProto, folder: Path) -> list[Part]:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return [tensor.SerializeToString(deterministic=True)]
    place = ExternalDataInfo(tensor)
    data = Stretch(folder / place.location, place.offset or 0, place.length or 0)
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")
    begin, end = _around(tensor, RAW_DATA)
    return [begin, *_inside(RAW_DATA, [data]), end]


def _inside(number: int, parts: list[Part]) -> list[Part]:
    """A message or bytes as the field with this number."""
    return [_varint(number << 3 | LENGTH_DELIMITED) + _varint(_size(parts)), *parts]


def _size(parts: list[Part]) -> int:
    return sum(part.num_bytes if isinstance(part, Stretch) else len(part) for part in parts)


def _around(message: Any, number: int) -> tuple[bytes, bytes]:
    """The bytes of a message's fields before the one with this number, and of those after it."""
    before, after = type(message)(), type(message)()
    for part in (before, after):
        part.CopyFrom(message)
    for field, _ in message.ListFields():
        if field.number <= number:
            after.ClearField(field.name)
        if field.number >= number:
            before.ClearField(field.name)
    return before.SerializeToString(deterministic=True), after.SerializeToString(deterministic=True)


def _varint(number: int) -> bytes:
    """Seven bits to a byte, the lowest first; the eighth is set where another byte follows."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _strip(model: onnx.ModelProto) -> None:
    """Remove what tells about this machine: stack traces with source paths, notes of torch."""
    graph = model.graph
    del graph.value_info[:]
    holders: list[Any] = [model, graph, *graph.node, *graph.input, *graph.output]
    holders += [*graph.initializer, *model.functions]
    holders += [node for function in model.functions for node in function.node]
    for holder in holders:
        del holder.metadata_props[:]
        holder.doc_string = ""


def _name_sizes(model: onnx.ModelProto, interface: Interface) -> None:
    """Call what varies by its name, ``batch`` and those of the interface, not by torch's symbol."""
    wanted = [*interface.inputs, *interface.outputs]
    ports = [*model.graph.input, *model.graph.output]
    for port, spec in zip(ports, wanted, strict=True):
        sizes = zip(port.type.tensor_type.shape.dim, ("batch", *spec.shape), strict=False)
        for dimension, name in sizes:
            if dimension.dim_param and isinstance(name, str):
                dimension.dim_param = name


def _port(port: Any) -> PortSignature:
    shape = tuple(size if isinstance(size, int) else None for size in port.shape)
    return PortSignature(port.name, ORT_DTYPES.get(port.type, port.type), shape)
