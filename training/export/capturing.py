"""The champion's graph, captured once for all formats that are made from one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from holdfast.training.errors import ExportError
from holdfast.training.export.class_names import first_names
from holdfast.training.export.guard import PREFIX, GuardedModel
from holdfast.training.export.specification import Inputs, TensorSpec

MAX_MESSAGE_CHARS = 600


def capture(
    model: GuardedModel, examples: Inputs, max_batch_size: int, ports: Sequence[TensorSpec] = ()
) -> ExportedProgram:
    """The model's graph with a dynamic batch, and the sizes that ``ports`` have a name for.

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
    shapes = _dynamic_shapes(examples, max_batch_size, ports)
    # The fast path zeroes padded positions, which no other runtime does.
    had_fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), first_names(model):
            # torch's own LSTM and GRU set this attribute whenever they are moved.
            warnings.filterwarnings("ignore", r"The tensor attributes .*_flat_weights", UserWarning)
            program = torch.export.export(
                _copy_around_weights(model),
                examples,
                dynamic_shapes={"inputs": shapes},
                strict=False,
            )
    except Exception as error:  # torch raises its own, many and private, classes
        reason = " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
        raise ExportError(f"torch.export cannot capture the model: {reason}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(had_fastpath)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds the paths of this machine
    return program


def _copy_around_weights(model: GuardedModel) -> GuardedModel:
    """The model's modules once more, for torch to change as it likes, around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _dynamic_shapes(
    examples: Inputs, max_batch_size: int, ports: Sequence[TensorSpec]
) -> tuple[dict[int, Any], ...]:
    """What may vary of each input: its number of samples, and the sizes that have a name.

    Of these torch finds the range for itself, such as the longest that a table of positions has.
    """
    batch = torch.export.Dim("batch", min=1, max=max_batch_size)
    shapes: list[dict[int, Any]] = [{0: batch} for _ in examples]
    for port, shape in zip(ports, shapes, strict=False):
        named = [number for number, size in enumerate(port.shape, 1) if isinstance(size, str)]
        shape.update(dict.fromkeys(named, torch.export.Dim.DYNAMIC))
    return tuple(shapes)


def unused_tensors(program: ExportedProgram) -> set[str]:
    """Parameters and buffers of the champion that no output of its graph depends on."""
    signature = program.graph_signature
    by_node = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    waiting = [node for node in program.graph.nodes if node.op == "output"]
    needed = set(waiting)
    while waiting:
        found = [node for node in waiting.pop().all_input_nodes if node not in needed]
        needed.update(found)
        waiting += found
    return {
        by_node[node.name].removeprefix(PREFIX)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in by_node and node not in needed
    }
