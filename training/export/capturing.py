"""The champion's graph, captured once for all formats that are made from one."""

from __future__ import annotations

import copy
import warnings

import torch
from torch.export import ExportedProgram

from holdfast.training.errors import ExportError
from holdfast.training.export.class_names import first_names
from holdfast.training.export.guard import PREFIX, GuardedModel
from holdfast.training.export.specification import Inputs

MAX_MESSAGE_CHARS = 600


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
        with warnings.catch_warnings(), first_names(model):
            # torch's own LSTM and GRU set this attribute whenever they are moved.
            warnings.filterwarnings("ignore", r"The tensor attributes .*_flat_weights", UserWarning)
            program = torch.export.export(
                copy.deepcopy(model),
                examples,
                dynamic_shapes={"inputs": tuple({0: batch} for _ in examples)},
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


def unused_tensors(program: ExportedProgram) -> set[str]:
    """Parameters and buffers of the champion that its graph does not use."""
    signature = program.graph_signature
    by_node = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {
        by_node[node.name].removeprefix(PREFIX)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in by_node and not node.users
    }
